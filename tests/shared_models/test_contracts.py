"""What crosses a hospital's boundary is frozen, closed, finite, silent and written down.

The JSON schemas in ``tests/golden/schemas`` are what other people's programs rely on. After a
change that is meant, write them anew and review the difference::

    python tests/shared_models/test_contracts.py
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import ValidationError

from shared_models.contracts import (
    CONTRACTS,
    REFUSALS,
    Admission,
    Approval,
    AuditReport,
    Bulletin,
    Checkpoint,
    Commit,
    Contract,
    Countersignature,
    Evaluation,
    Fingerprint,
    FingerprintReport,
    Health,
    Histogram,
    Invite,
    JoinRequest,
    JournalEntry,
    JournalLine,
    Offer,
    PrivacyEvent,
    PrivacyStatement,
    ProbeAnswer,
    ProbeRequest,
    Receipt,
    Refusal,
    RefusalCode,
    ReleaseManifest,
    Reservation,
    RoundOrder,
    RoundRecord,
    Signature,
    SignedAdmission,
    SignedCheckpoint,
    SignedInvite,
    SignedJoinRequest,
    SignedReceipt,
    SiteReply,
    StudyReport,
    ValidationReport,
    Visit,
)
from shared_models.plan import StudyPlan

SCHEMAS = Path(__file__).parents[1] / "golden" / "schemas"
MARK = "MARKED-7731"

STUDY = "5" * 64
NOON = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)
EVENT = PrivacyEvent(
    sample_rate=0.1, noise_multiplier=1.0, max_grad_norm=1.0, images_per_patient=4, steps=10
)
STATEMENT = PrivacyStatement(
    epsilon=1.0,
    delta=1e-5,
    epsilon_rdp=1.1,
    noise_multiplier=1.0,
    sample_rate=0.1,
    max_grad_norm=1.0,
    images_per_patient=4,
    steps=10,
    covers="updates",
    does_not_cover="metrics",
)
SIGNATURE = Signature(key="a" * 64, value="b" * 128)
ENTRY = JournalEntry(
    site="north", index=0, previous="0" * 64, when=NOON, kind="opened", key="a" * 64
)
CHECKPOINT = Checkpoint(site="north", index=0, head="c" * 64, when=NOON)
PEM = "-----BEGIN CERTIFICATE-----\nAA==\n-----END CERTIFICATE-----\n"
INVITE = Invite(
    consortium="Lungs of the North",
    site="north",
    coordinator="a" * 64,
    authority=PEM,
    fleet="fleet.example.org:443",
    control="control.example.org:443",
    enrolment="control.example.org:8443",
    nonce="f" * 64,
    expires_at=NOON,
)
REQUEST = JoinRequest(
    site="north",
    invite="e" * 64,
    signing="a" * 64,
    node="ecdsa-sha2-nistp384 AAAA",
    csr=PEM,
    when=NOON,
)
ADMISSION = Admission(site="north", request="e" * 64, status="accepted", certificate=PEM, when=NOON)
HEALTH = Health(version="0.1.0", started_at=NOON, free_mb=1000, has_gpu=False, certificate_days=89)
OFFER = Offer(plan_toml="", state="running", num_rounds_done=3)
RECEIPT = Receipt(site="north", checkpoint="e" * 64, index=0, when=NOON)
EVALUATION = Evaluation(
    metrics={"auc": 0.9}, intervals={"auc": (0.8, 0.95)}, num_patients=10, num_images=20
)
REFUSAL = Refusal(study=STUDY, round_=1, kind="train", site="north", code="budget")
REPLY = SiteReply(
    study=STUDY,
    round_=1,
    kind="train",
    site="north",
    num_patients=40,
    train_loss=0.5,
    update_digest="c" * 64,
    evaluation=EVALUATION,
    privacy=STATEMENT,
    seconds=1.5,
)
FINGERPRINT = Fingerprint(
    min_cell=0, histograms=(Histogram(name="spacing-x", counts=(0.5, 20.25)),)
)
APPROVAL = Approval(study=STUDY, site="north", decision="approved", who="Dr. Lind", when=NOON)
VALIDATION = ValidationReport(
    study=STUDY, weights_digest="d" * 64, metrics={"auc": 0.9}, num_patients=10, num_images=10
)

EXAMPLES: tuple[Contract, ...] = (
    EVENT,
    STATEMENT,
    Reservation(study=STUDY, round_=0, event=EVENT, delta=1e-4, when=NOON),
    Commit(study=STUDY, round_=0, purpose="train", attempt=1, reply="e" * 64, when=NOON),
    SIGNATURE,
    RoundOrder(
        study=STUDY,
        round_=0,
        kind="train",
        site="north",
        weights_digest="d" * 64,
        issued_at=NOON,
        expires_at=NOON,
    ),
    EVALUATION,
    FINGERPRINT.histograms[0],
    FINGERPRINT,
    REPLY,
    REFUSAL,
    APPROVAL,
    Countersignature(approval=APPROVAL, signature=SIGNATURE),
    ENTRY,
    JournalLine(entry=ENTRY, signature=SIGNATURE),
    CHECKPOINT,
    SignedCheckpoint(checkpoint=CHECKPOINT, signature=SIGNATURE),
    INVITE,
    SignedInvite(invite=INVITE, signature=SIGNATURE),
    REQUEST,
    SignedJoinRequest(request=REQUEST, signature=SIGNATURE),
    ADMISSION,
    SignedAdmission(admission=ADMISSION, signature=SIGNATURE),
    HEALTH,
    Visit(
        site="north",
        when=NOON,
        decisions=(Countersignature(approval=APPROVAL, signature=SIGNATURE),),
        checkpoint=SignedCheckpoint(checkpoint=CHECKPOINT, signature=SIGNATURE),
        health=HEALTH,
    ),
    OFFER,
    RECEIPT,
    SignedReceipt(receipt=RECEIPT, signature=SIGNATURE),
    Bulletin(
        site="north",
        when=NOON,
        offers=(OFFER,),
        receipt=SignedReceipt(receipt=RECEIPT, signature=SIGNATURE),
    ),
    ProbeRequest(up_bytes=2**30, down_bytes=0),
    ProbeAnswer(received_bytes=2**20, when=NOON),
    RoundRecord(
        round_=1,
        kind="train",
        replies=(REPLY,),
        refusals=(REFUSAL,),
        validation=EVALUATION,
        weights_digest="d" * 64,
        seconds=2.0,
        sent_bytes=100,
        received_bytes=100,
    ),
    VALIDATION,
    StudyReport.model_validate(
        {
            "study": STUDY,
            "name": "lungs",
            "purpose": "research",
            "description": "",
            "task": "classification",
            "headline": "auc",
            "created": NOON,
            "seed": 1,
            "data": "films",
            "plan_toml": "",
            "software": {"python": "3.11"},
            "is_private": True,
            "sites": [
                {"name": "north", "num_patients": 40, "metrics": {}, "num_test_patients": 10}
            ],
            "rounds": [
                {
                    "round_": 0,
                    "validation": {"auc": 0.5},
                    "sites": {"north": {"auc": 0.5}},
                    "train_loss": {},
                    "seconds": 1.0,
                    "slowest_site_seconds": 1.0,
                    "sent_bytes": 1,
                    "received_bytes": 1,
                }
            ],
            "global": VALIDATION.model_dump(),
            "model_digest": "d" * 64,
            "model_bytes": 4,
            "seconds": 2.0,
        }
    ),
    FingerprintReport(
        study=STUDY,
        name="lungs",
        plan_toml="",
        created=NOON,
        replies=(REPLY.model_copy(update={"fingerprint": FINGERPRINT}),),
        refusals=(REFUSAL,),
        total=FINGERPRINT,
        num_patients=40,
        seconds=2.0,
    ),
    ReleaseManifest(
        study=STUDY,
        round_=2,
        net="unet",
        task="segmentation",
        weights_digest="d" * 64,
        weights_file="weights.safetensors",
        num_parameters=4,
        strategy="fedavg",
        validation=EVALUATION,
        privacy={"north": STATEMENT},
        intended_use="research",
    ),
    AuditReport(subject=STUDY, passed=("all",), failed=()),
)

by_name = pytest.mark.parametrize("example", EXAMPLES, ids=lambda e: type(e).__name__)


def schemas() -> dict[str, str]:
    return {
        contract.__name__: json.dumps(contract.model_json_schema(), indent=2, sort_keys=True) + "\n"
        for contract in (*CONTRACTS, StudyPlan)
    }


def test_every_contract_has_an_example_here() -> None:
    assert [type(example) for example in EXAMPLES] == list(CONTRACTS)


@pytest.mark.parametrize("name", sorted(schemas()))
def test_a_schema_changes_only_on_purpose(name: str) -> None:
    assert (SCHEMAS / f"{name}.json").read_text(encoding="utf-8") == schemas()[name]


def test_there_is_no_schema_of_a_contract_that_is_gone() -> None:
    assert sorted(file.stem for file in SCHEMAS.iterdir()) == sorted(schemas())


@by_name
def test_a_contract_survives_json(example: Contract) -> None:
    text = example.model_dump_json(by_alias=True)
    assert type(example).model_validate_json(text) == example


@by_name
def test_a_contract_cannot_be_changed(example: Contract) -> None:
    name = next(iter(type(example).model_fields))
    with pytest.raises(ValidationError, match="frozen"):
        setattr(example, name, getattr(example, name))


@by_name
def test_an_unknown_field_is_refused(example: Contract) -> None:
    with pytest.raises(ValidationError, match="Extra inputs"):
        type(example).model_validate(example.model_dump(by_alias=True) | {"patient": "x"})


def paths(value: Any, *, of: type) -> Iterator[tuple[str | int, ...]]:
    """Yield where in nested dictionaries and lists the values of a type lie."""
    if isinstance(value, of) and not isinstance(value, bool):
        yield ()
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from ((key, *path) for path in paths(inner, of=of))


def with_value(example: Contract, path: tuple[str | int, ...], new: Any) -> dict[str, Any]:
    data = json.loads(example.model_dump_json(by_alias=True))
    place = data
    for part in path[:-1]:
        place = place[part]
    place[path[-1]] = new
    return dict(data)


WITH_NUMBERS = [
    example
    for example in EXAMPLES
    if list(paths(json.loads(example.model_dump_json(by_alias=True)), of=float))
]


@pytest.mark.parametrize("bad", ["NaN", "Infinity", "-Infinity", "1e999"])
@pytest.mark.parametrize("example", WITH_NUMBERS, ids=lambda e: type(e).__name__)
def test_no_number_may_be_nan_or_infinite(example: Contract, bad: str) -> None:
    found = list(paths(json.loads(example.model_dump_json(by_alias=True)), of=float))
    for path in found:
        text = json.dumps(with_value(example, path, "PLACE")).replace('"PLACE"', bad)
        with pytest.raises(ValidationError):
            type(example).model_validate_json(text)
        with pytest.raises(ValidationError):
            type(example).model_validate(with_value(example, path, math.nan))


@by_name
def test_an_error_never_repeats_the_input(example: Contract) -> None:
    """A patient's name in the place of any value is not in the message, not even its type's."""
    data = json.loads(example.model_dump_json(by_alias=True))
    refused = 0
    for kind in (str, float, int):
        for path in paths(data, of=kind):
            for bad in ([MARK], {MARK: 1}, f"{MARK}\n"):
                try:
                    type(example).model_validate(with_value(example, path, bad))
                except ValidationError as error:
                    refused += 1
                    assert MARK not in str(error)
    assert refused > 0


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("sample_rate", 0.0),
        ("sample_rate", 1.0001),
        ("noise_multiplier", 0.0),
        ("noise_multiplier", -1.0),
        ("max_grad_norm", 0.0),
        ("images_per_patient", 0),
        ("steps", 0),
        ("steps", 1.5),
        ("sampler", "shuffled"),
        ("relation", "replace-one"),
        ("unit", "image"),
        ("mechanism", "laplace"),
    ],
)
def test_an_event_that_cannot_be_accounted_cannot_be_written(field: str, value: Any) -> None:
    with pytest.raises(ValidationError, match=field):
        PrivacyEvent.model_validate(EVENT.model_dump() | {field: value})


@pytest.mark.parametrize(("field", "value"), [("epsilon", -0.1), ("delta", 0.0), ("delta", 1.0)])
def test_a_statement_outside_its_bounds_cannot_be_written(field: str, value: float) -> None:
    with pytest.raises(ValidationError, match=field):
        PrivacyStatement.model_validate(STATEMENT.model_dump() | {field: value})


@pytest.mark.parametrize("name", ["", "-a", "a b", "a/b", "../a", "a" * 64, "ä", "a\n", "a.toml"])
def test_a_site_has_a_name_that_is_safe_as_a_file(name: str) -> None:
    with pytest.raises(ValidationError):
        Refusal.model_validate(REFUSAL.model_dump() | {"site": name})


@pytest.mark.parametrize("name", ["patient MARKED", "Dice", "dice-1", "1auc", "a" * 49, ""])
def test_a_metric_has_a_name_that_can_carry_no_text(name: str) -> None:
    with pytest.raises(ValidationError):
        Evaluation(metrics={name: 0.5}, num_patients=1, num_images=1)


def test_a_refusal_has_a_code_from_the_list_and_no_text_of_its_own() -> None:
    assert set(REFUSALS) == set(get_args(RefusalCode))
    assert set(Refusal.model_fields) == {
        "schema_version",
        "study",
        "round_",
        "kind",
        "site",
        "code",
    }
    with pytest.raises(ValidationError):
        Refusal.model_validate(REFUSAL.model_dump() | {"code": "other"})


def test_the_report_is_read_and_written_with_global_as_its_field() -> None:
    report = next(e for e in EXAMPLES if isinstance(e, StudyReport))
    assert "global" in json.loads(report.model_dump_json(by_alias=True))


if __name__ == "__main__":
    SCHEMAS.mkdir(parents=True, exist_ok=True)
    for old in SCHEMAS.iterdir():
        old.unlink()
    for name, text in schemas().items():
        (SCHEMAS / f"{name}.json").write_text(text, encoding="utf-8")
