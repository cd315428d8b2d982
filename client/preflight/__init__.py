"""Whether this site can take part: everything that can go wrong, tried before a study does.

``CHECKS`` are tried in their order; each is a function from a case to findings (``base.py``), and
adding one is adding its name. None of them writes anything that stays, or takes the site's seat.
"""

from pathlib import Path

from client import config as configs
from client.preflight import data, dry, installed, line, machine, network, settings
from client.preflight.base import Case, Check, Depth, Finding, Progress, run
from shared_models import plan as plans
from shared_models.errors import DocumentError

#: By what they are about, as they are shown.
AREAS: dict[str, tuple[Check, ...]] = {
    "settings": (settings.keys, settings.authority, settings.certificate, settings.plan),
    "software": (installed.installed_files, installed.versions),
    "data": (data.manifest, data.patients, data.labels, data.images),
    "machine": (
        machine.state_folder,
        machine.disk,
        machine.records,
        machine.worker,
        dry.gpu,
        dry.dry_batch,
        machine.memory,
        dry.metrics,
    ),
    "network": (
        network.proxy,
        network.name,
        network.port,
        network.tls,
        network.clock_and_superlink,
        line.control_plane,
        line.time_per_round,
    ),
}
CHECKS: tuple[Check, ...] = tuple(check for checks in AREAS.values() for check in checks)


def examine(
    config_file: Path, plan_file: Path | None, *, depth: Depth, progress: Progress
) -> dict[str, list[Finding]]:
    """Return what all checks find, by area; settings or a plan that cannot be read end it there."""
    try:
        config = configs.read(config_file)
    except DocumentError as error:
        said, cure = "; ".join(error.objections), "correct site.toml; init writes a commented one"
        return {"settings": [Finding("site.toml", False, said, "settings", cure)]}
    read = [Finding("site.toml", True, f"the settings of {config.name}", "settings")]
    try:
        plan = None if plan_file is None else plans.read(plan_file).plan
    except DocumentError as error:
        said, cure = "; ".join(error.objections), "ask the coordinator for the plan's file again"
        return {"settings": [*read, Finding("plan", False, said, "server", cure)]}
    case = Case(config, plan=plan, depth=depth, progress=progress)
    found: dict[str, list[Finding]] = {}
    for area, checks in AREAS.items():
        progress(f"checking {area}", 0, 0)
        found[area] = list(run(case, checks))
    found["settings"] = read + found["settings"]
    return found


__all__ = ["AREAS", "CHECKS", "Case", "Check", "Finding", "examine", "run"]
