"""Performs shared initialisation once in the fork server instead of in each forked command.

These are the imports, the inspection of all signatures by jsonargparse, and the patterns by which transformers renames
weights.
"""

import io
from contextlib import redirect_stderr, suppress

from transformers.conversion_mapping import get_checkpoint_conversion_mapping

from safervlm.cli.arguments import prepared
from safervlm.cli.lightning import SaferCLI
from safervlm.cli.main import plain_commands, sequence_commands

plain_commands()
sequence_commands()
for command, recipe in (("predict", "measure"), ("fit", "ppo")):
    with suppress(SystemExit), redirect_stderr(io.StringIO()):  # rejects the last argument
        SaferCLI(prepared([command, f"--config=configs/{recipe}.yaml", "--trainer.max_epochs=none at all"]))

get_checkpoint_conversion_mapping("llava")
