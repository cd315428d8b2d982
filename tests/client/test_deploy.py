"""The commented examples in deploy/ are what the code reads and writes."""

from datetime import UTC, datetime
from pathlib import Path

from client import config
from client.policy import judge
from client.setup import config_text
from shared_models import plan as plans

DEPLOY = Path(__file__).parents[2] / "deploy"


def test_the_example_site_is_what_join_writes() -> None:
    site = config.read(DEPLOY / "site.toml")
    text = config_text(
        name=site.name,
        coordinator=site.coordinator,
        address=site.link.address,
        root_certificates="consortium-ca.crt",
        manifest="/data/chest/manifest.csv",
        root="/data/chest",
        control="control.example.org:443",
    )
    assert (DEPLOY / "site.toml").read_text() == text


def test_the_example_site_admits_the_example_plan() -> None:
    signed = plans.read(DEPLOY / "plan.toml")
    site = config.read(DEPLOY / "site.toml")
    assert judge(signed.plan, site, today=datetime.now(UTC).date()) == []
