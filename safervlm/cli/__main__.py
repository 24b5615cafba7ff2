"""Entry point of ``python -m safervlm.cli``."""

from safervlm.cli.main import main

if __name__ == "__main__":
    main()
