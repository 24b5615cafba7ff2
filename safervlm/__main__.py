"""Entry point of ``python -m safervlm``."""

from safervlm.cli.main import main

if __name__ == "__main__":
    main()
