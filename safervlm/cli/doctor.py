"""``safervlm doctor``: checks whether this machine meets the requirements of a run, before it is started."""

import sys
from pathlib import Path
from pkgutil import resolve_name

from lightning import LightningModule
from lightning.pytorch.utilities.model_helpers import is_overridden

from safervlm.cli.arguments import prepared
from safervlm.cli.lightning import IdleCLI, as_command_line, silence_third_party
from safervlm.cli.machine import hub_token, machine
from safervlm.cli.recipe_checks import recipe
from safervlm.errors import ArgumentError
from safervlm.io.escape import for_rich
from safervlm.io.settings import read_settings
from safervlm.io.tables import TextTable, show_table
from safervlm.io.trust import Named, allow_imports_from_current_folder, check_trust, named_in
from safervlm.recipes import local_or_shipped
from safervlm.run_folder import RunFolder


def doctor(
    config: list[str] | None = None, vlm: str | None = None, online: bool = False, trust_config: bool = False
) -> None:
    """Checks Python, packages, GPU, disk, the Hub's token, and a recipe's models and data; exit code 1 on an error.

    Args:
        config: The recipe, then its overlays, in the same order as for safervlm predict or fit.
        vlm: A file of configs/vlm, or another one, to check instead of the recipe's VLM.
        online: Also query the Hub whether the recipe's repositories are accessible; otherwise nothing is sent from this
            machine.
        trust_config: Allow importing classes that are not SaferVLM's, if a configuration lies in a run folder, which
            others may have written.

    Raises:
        ArgumentError: ``vlm`` is given without ``config``, a file is missing or invalid, or a configuration of a run
            folder names classes that are not allowed.
        SystemExit: With exit code 1, if a check failed.
    """
    findings = [*machine(), *hub_token()]
    if vlm and not config:
        raise ArgumentError(f"--vlm: {vlm!r} is checked together with a recipe: --config configs/measure.yaml")
    if config:
        files = [local_or_shipped(file) for file in config]
        missing = [file for file in files if not Path(file).is_file()]
        if missing:
            raise ArgumentError(f"--config: no file {missing[0]!r}; see configs/")
        configs = [read_settings(Path(file), "--config") for file in files]
        for file, content in zip(files, configs, strict=True):
            if RunFolder(Path(file).parent).manifest.is_file():
                named = named_in(content, Path(file).parent)
                check_trust(Path(file), Named(code=named.code), "--config", trust_config)
        allow_imports_from_current_folder()
        # Overlays name no class, so the last class_path is the recipe's.
        models = [content.get("model", {}) for content in configs]
        paths = [model["class_path"] for model in models if isinstance(model, dict) and "class_path" in model]
        trains = bool(paths) and is_overridden("training_step", resolve_name(paths[-1]), LightningModule)
        command = "fit" if trains else "predict"
        line = [command, *(part for file in files for part in ("--config", file))]
        line = prepared([*line, "--model.vlm", vlm] if vlm else line)
        silence_third_party()
        with as_command_line(line):
            settings = IdleCLI(line, build=False).config[command]
        findings += recipe(settings, online)
    table = TextTable()
    table.show_edge = False
    for heading in ("", "what", "found"):
        table.add_column(heading, overflow="fold")
    colours = {"ok": "green", "warning": "yellow", "error": "red"}
    for finding in findings:
        table.add_row(for_rich(finding.state, colours[finding.state]), finding.what, finding.found)
    show_table(table)
    if any(finding.state == "error" for finding in findings):
        sys.exit(1)
