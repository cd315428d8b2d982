"""Everything that crosses a hospital's boundary, as frozen values.

A value that may leave a hospital is a field of a model in this file or of the plan in ``plan.py``;
anything derived from a patient that is not here is only ever an argument. Unknown fields, NaN and
infinities are refused; error messages never repeat the offending input.

Design: one flat file, no inheritance beyond the shared settings. A field is never renamed or given
a new meaning: add a field and raise ``schema_version``. The JSON schemas are golden files in
``tests/golden/schemas``.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

SCHEMA_VERSION = 1

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
PublicKey = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
SignatureValue = Annotated[str, Field(pattern=r"^[0-9a-f]{128}$")]
SiteName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,62}$")]
Name = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_-]{0,62}$")]
#: What a model is set beside: a filter, a guess, the weights before training.
BaselineName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9 -]{0,47}$")]
MetricName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,47}$")]
Probability = Annotated[float, Field(gt=0, lt=1)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=0)]
Shares = Annotated[int, Field(ge=1, le=1000)]  # at most one for each site of a plan
Address = Annotated[str, Field(pattern=r"^[A-Za-z0-9.:\[\]_-]{1,255}:\d{1,5}$")]  # host:port
Pem = Annotated[str, Field(pattern=r"^-----BEGIN [A-Z ]{1,40}-----\n", max_length=8192)]
NodeKey = Annotated[str, Field(pattern=r"^ecdsa-sha2-nistp384 [A-Za-z0-9+/=]{1,300}$")]
Version = Annotated[str, Field(pattern=r"^[0-9A-Za-z.+-]{1,40}$")]
Modality = Annotated[str, Field(pattern=r"^[A-Z0-9_]{1,16}$")]  # DICOM (0008,0060)
ProbeBytes = Annotated[int, Field(ge=0, le=2**30)]
Title = Annotated[str, Field(pattern=r"^[^\x00-\x1f\x7f]{1,120}$")]

OrderKind = Literal["train", "evaluate", "alone", "fingerprint"]
EventPurpose = Literal["train", "alone", "fingerprint"]
PrivacyUnit = Literal["patient", "site"]
Sampler = Literal["poisson", "all"]


class Contract(BaseModel):
    """The settings every contract shares: frozen, closed, finite and silent about its input."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        hide_input_in_errors=True,
        populate_by_name=True,
    )


# --- privacy: what was done, and what may be said about it


class PrivacyEvent(Contract):
    """A run of identical noisy steps over one cohort: what was done, never what it costs.

    ``unit`` is what is added or removed: a patient of the cohort, or a whole site of the study, of
    which ``images_per_patient`` says nothing. ``sampler``: ``poisson`` if each unit entered each
    step independently with probability ``sample_rate``, ``all`` if every unit entered every step.
    ``noise_multiplier`` is the standard deviation over ``max_grad_norm`` of all the noise in what
    anybody sees. ``noise_shares`` is how many sites' independent shares add up to that noise under
    secure aggregation; each adds noise_multiplier / sqrt(noise_shares). 1: this site adds it all.
    """

    mechanism: Literal["gaussian"] = "gaussian"
    sampler: Sampler = "poisson"
    relation: Literal["add-or-remove-one"] = "add-or-remove-one"
    unit: PrivacyUnit = "patient"
    purpose: EventPurpose = "train"
    sample_rate: Annotated[float, Field(gt=0, le=1)]
    noise_multiplier: Positive
    max_grad_norm: Positive
    images_per_patient: Annotated[int, Field(ge=1)]
    steps: Annotated[int, Field(ge=1)]
    noise_shares: Shares = 1

    @model_validator(mode="after")
    def _check_that_all_is_everybody(self) -> Self:
        if self.sampler == "all" and self.sample_rate != 1:
            raise ValueError(
                "expected a sample_rate of 1 where the sampler is 'all'; if units are drawn "
                "independently the sampler is 'poisson', and nothing else can be accounted"
            )
        return self


class PrivacyStatement(Contract):
    """An epsilon with everything it needs to mean something.

    ``epsilon`` is rounded up to four decimals; ``epsilon_rdp`` is a second, looser accountant's
    answer to the same question. ``steps`` counts noisy steps, those of the comparison included.
    Where ``noise_shares`` is over 1, ``epsilon`` rests on sums over sites being all that anybody
    sees; ``epsilon_unmasked`` is what this site's own share of the noise would be worth if they
    were not. It is absent where it is infinite, and where the site adds all the noise itself.
    """

    epsilon: NonNegative
    delta: Probability
    unit: PrivacyUnit = "patient"
    relation: Literal["add-or-remove-one"] = "add-or-remove-one"
    sampler: Sampler = "poisson"
    mechanism: Literal["gaussian"] = "gaussian"
    accountant: Literal["dp_accounting PLD, pessimistic"] = "dp_accounting PLD, pessimistic"
    epsilon_rdp: NonNegative
    noise_multiplier: Positive
    sample_rate: Annotated[float, Field(gt=0, le=1)]
    max_grad_norm: Positive
    images_per_patient: Annotated[int, Field(ge=1)]
    steps: Count
    noise_shares: Shares = 1
    epsilon_unmasked: NonNegative | None = None
    covers: str
    does_not_cover: str


class Reservation(Contract):
    """One line of a site's privacy ledger: what one round of one study did to its cohort.

    ``attempt`` numbers the charges of one round for one purpose, from 0. ``delta`` is the one the
    study agreed on, at which its epsilon is stated.
    """

    kind: Literal["reservation"] = "reservation"
    study: Digest
    round_: Annotated[int, Field(ge=0)]
    attempt: Count = 0
    event: PrivacyEvent
    delta: Probability
    when: datetime


class Commit(Contract):
    """The ledger's other kind of line: from here on the reply made under a reservation may leave.

    It names the reservation by what it was for, and the reply by its digest. It costs nothing and
    gives nothing back: a reservation without one counts the same.
    """

    kind: Literal["commit"] = "commit"
    study: Digest
    round_: Annotated[int, Field(ge=0)]
    purpose: EventPurpose
    attempt: Count
    reply: Digest
    when: datetime


# --- messages between coordinator and site


class Signature(Contract):
    """An Ed25519 signature over the canonical bytes of a contract (see ``signing.py``)."""

    key: PublicKey
    value: SignatureValue


Decision = Literal["approved", "refused", "withdrawn"]
DecisionReason = Literal["purpose", "privacy", "data", "capacity", "legal", "other"]


class Approval(Contract):
    """A site's own decision about a plan, signed with the site's key (the second key).

    The newest decision counts. ``reason`` is why a plan was refused or an approval withdrawn: a
    word from a closed list, for the coordinator; people's own words stay in the hospital.
    ``mask_key`` is the public half (X25519) of the key made for this study's secure aggregation.
    """

    schema_version: Literal[1] = 1
    study: Digest
    site: SiteName
    decision: Decision
    reason: DecisionReason | None = None
    who: Annotated[str, Field(min_length=1, max_length=120)]
    when: datetime
    mask_key: PublicKey | None = None


class Countersignature(Contract):
    """An approval with the site's signature over it: what the coordinator must hold to order."""

    approval: Approval
    signature: Signature


class RoundOrder(Contract):
    """The coordinator asks one site for one thing in one round.

    ``train``: evaluate the weights sent, then train from them and answer an update.
    ``evaluate``: only evaluate the weights sent. ``alone``: train from the weights sent for the
    whole study's steps with no help, keep the model, answer its metrics.
    ``fingerprint``: tell the histograms the plan asks for; no weights come with it.

    Under secure aggregation ``participants`` are the countersignatures of all sites asked, this one
    included, whose masks cancel; ``attempt`` counts how often the round was asked, from 0.
    """

    schema_version: Literal[1] = 1
    study: Digest
    round_: Annotated[int, Field(ge=0)]
    kind: OrderKind
    site: SiteName
    weights_digest: Digest
    attempt: Count = 0
    participants: tuple[Countersignature, ...] = ()
    issued_at: datetime
    expires_at: datetime


class Evaluation(Contract):
    """Metrics over held-out patients, each with a 95 % bootstrap interval over patients.

    A metric that cannot be computed (one class only, say) is absent.
    """

    metrics: dict[MetricName, float]
    intervals: dict[MetricName, tuple[float, float]] = {}
    num_patients: Count
    num_images: Count


class Histogram(Contract):
    """Counts of patients in the cells that a plan lays out (``fingerprint.layouts``).

    Noised, they are any numbers; gathered, whole ones of which none is small.
    """

    name: Name
    counts: Annotated[tuple[float, ...], Field(min_length=2, max_length=66)]


class Fingerprint(Contract):
    """What a site tells of its training patients' images: histograms of counts, nothing else.

    ``min_cell``: fewer patients than that are never told by themselves; 0 where noise was added.
    """

    min_cell: Count
    histograms: Annotated[tuple[Histogram, ...], Field(min_length=1, max_length=40)]


class SiteReply(Contract):
    """What a site answers to an order it obeyed. The update's arrays travel beside it.

    A masked update is the update times ``num_patients``, hidden (``masking.py``): it means nothing
    but in the sum over all participants.
    """

    schema_version: Literal[1] = 1
    study: Digest
    round_: Annotated[int, Field(ge=0)]
    kind: OrderKind
    site: SiteName
    num_patients: Count
    train_loss: float | None = None
    attempt: Count = 0
    update_digest: Digest | None = None
    is_masked: bool = False
    evaluation: Evaluation | None = None
    privacy: PrivacyStatement | None = None
    fingerprint: Fingerprint | None = None
    seconds: NonNegative = 0.0


RefusalCode = Literal[
    "bad-order",
    "bad-signature",
    "not-approved",
    "out-of-order",
    "expired",
    "policy",
    "quiet-hours",
    "budget",
    "too-few-patients",
    "peers",
    "data",
    "gate",
    "failed",
    "no-answer",
    "bad-reply",
]

#: What each refusal means, for people. Only the code crosses the boundary.
REFUSALS: dict[str, str] = {
    "bad-order": "the order could not be read, or its weights do not match what it announces",
    "bad-signature": "the order is not signed by the coordinator this site knows",
    "not-approved": "this site has not approved this plan",
    "out-of-order": "the order precedes a round this site has answered, or follows the plan's last",
    "expired": "the order or the plan has expired",
    "policy": "the plan breaks a rule of this site",
    "quiet-hours": "the site trains nothing at this hour; ask again later",
    "budget": "the round would exceed the privacy budget",
    "too-few-patients": "fewer patients than the plan or the site allows",
    "peers": "too few of the sites taking part are known to this site to hide its update among",
    "data": "the site's data cannot be used for this plan",
    "gate": "the result did not pass the site's outbound gate",
    "failed": "training failed at the site; its journal says why",
    "no-answer": "the site did not answer before the deadline",
    "bad-reply": "the coordinator refused the site's reply: wrong shape, size, digest or value",
}


class Refusal(Contract):
    """What a site answers when it does not obey: a code from a closed list, nothing else."""

    schema_version: Literal[1] = 1
    study: Digest
    round_: Annotated[int, Field(ge=0)]
    kind: OrderKind
    site: SiteName
    code: RefusalCode


# --- what a site writes down of itself


JournalKind = Literal[
    "opened",
    "started",
    "stopped",
    "config",
    "trusted",
    "joined",
    "renewed",
    "connected",
    "offered",
    "approved",
    "refused-plan",
    "refused",
    "withdrawn",
    "order",
    "refusal",
    "reservation",
    "commit",
    "reply",
    "repaired",
    "checkpoint",
    "ingested",
    "mapped",
]

#: The fields each kind of entry has; it has no others. An epsilon may be left out.
JOURNAL_FIELDS: dict[JournalKind, tuple[str, ...]] = {
    "opened": ("key",),
    "started": (),
    "stopped": (),
    "config": ("digest",),
    "trusted": ("who", "key"),
    "joined": ("key", "digest"),
    "renewed": ("digest",),
    "connected": (),
    "offered": ("study",),
    "approved": ("study", "who", "digest"),
    "refused-plan": ("study", "who"),
    "refused": ("study", "who", "digest"),
    "withdrawn": ("study", "who", "digest"),
    "order": ("study", "round_", "order_kind", "attempt", "digest"),
    "refusal": ("study", "round_", "order_kind", "code"),
    "reservation": ("study", "round_", "order_kind", "attempt", "digest", "epsilon", "delta"),
    "commit": ("study", "round_", "order_kind", "attempt", "digest"),
    "reply": ("study", "round_", "order_kind", "attempt", "digest", "size_bytes"),
    "repaired": ("digest", "size_bytes"),
    "checkpoint": ("digest",),
    "ingested": ("digest",),
    "mapped": ("who", "digest"),
}


class JournalEntry(Contract):
    """One thing that was asked, decided or sent at a site; none of it comes from a patient.

    ``previous`` is the digest of the signed line before this one, zeros for the first, which states
    the site's public signing ``key``. ``digest`` is that of what the entry is about: the site.toml,
    the certificate, the decision, the order, the ledger's line, the reply, the bytes a crash cut
    short, the checkpoint, the counts of a run that took images in, the mapping of labels.
    ``epsilon`` is what the study has cost a patient so far. ``who`` decided; ``refused-plan`` says
    that the site's rules, not its people, kept a plan from being approved. Of what is trusted
    ``who`` is the peer's name, and ``key`` its key; of what was joined ``key`` is the
    coordinator's.
    """

    schema_version: Literal[1] = 1
    site: SiteName
    index: Count
    previous: Digest
    when: datetime
    kind: JournalKind
    study: Digest | None = None
    round_: Count | None = None
    order_kind: OrderKind | None = None
    attempt: Count | None = None
    code: RefusalCode | None = None
    digest: Digest | None = None
    size_bytes: Count | None = None
    epsilon: NonNegative | None = None
    delta: Probability | None = None
    who: Annotated[str, Field(min_length=1, max_length=120)] | None = None
    key: PublicKey | None = None

    @model_validator(mode="after")
    def _check_that_the_fields_are_the_kinds(self) -> Self:
        common = {"schema_version", "site", "index", "previous", "when", "kind"}
        given = {name for name, value in self if value is not None} - common
        expected = set(JOURNAL_FIELDS[self.kind])
        if given | {"epsilon"} != expected | {"epsilon"} or not given <= expected:
            raise ValueError(f"expected of '{self.kind}' exactly {', '.join(sorted(expected))}")
        is_first = self.index == 0
        if (self.kind == "opened") is not is_first or is_first is not (self.previous == "0" * 64):
            raise ValueError("expected 'opened' first, following nothing, and nowhere else")
        if self.when.utcoffset() != timedelta(0):
            raise ValueError("expected a time in UTC")
        return self


class JournalLine(Contract):
    """One line of a site's journal: an entry and the site's signature over it."""

    entry: JournalEntry
    signature: Signature


class Checkpoint(Contract):
    """How far a journal had come: the digest of its signed line at ``index``."""

    schema_version: Literal[1] = 1
    site: SiteName
    index: Count
    head: Digest
    when: datetime


class SignedCheckpoint(Contract):
    """A checkpoint with the site's signature: kept elsewhere, it holds the site to its journal."""

    checkpoint: Checkpoint
    signature: Signature


# --- the control plane: how a hospital joins, and what it and the coordinator tell each other


class Invite(Contract):
    """Where a consortium is and how it is recognised: all that a hospital needs to join it.

    It holds no secret. ``authority`` is the certificate (PEM) of the consortium's own authority;
    the addresses are of Flower's fleet API, of the control plane (mutual TLS) and of enrolment (TLS
    by which only the coordinator is known). ``nonce`` is drawn at random: it makes the invite one.
    """

    schema_version: Literal[1] = 1
    consortium: Title
    site: SiteName
    coordinator: PublicKey
    authority: Pem
    fleet: Address
    control: Address
    enrolment: Address
    nonce: Digest
    expires_at: datetime


class SignedInvite(Contract):
    """An invite with its coordinator's signature."""

    invite: Invite
    signature: Signature


class JoinRequest(Contract):
    """A hospital asks to be let in, by the digest of its invite, with the keys it made itself.

    ``node`` authenticates it to Flower's fleet API, ``csr`` (PEM) asks for its certificate on the
    control plane. The words people compare are made of this value's digest (``words.py``).
    """

    schema_version: Literal[1] = 1
    site: SiteName
    invite: Digest
    signing: PublicKey
    node: NodeKey
    csr: Pem
    when: datetime


class SignedJoinRequest(Contract):
    """A request with the signature of the signing key it brings."""

    request: JoinRequest
    signature: Signature


class Admission(Contract):
    """What the coordinator answers a request to join, or to renew a certificate.

    ``pending``: nobody has compared the words yet. Only ``accepted`` comes with a certificate.
    """

    schema_version: Literal[1] = 1
    site: SiteName
    request: Digest
    status: Literal["pending", "accepted", "refused"]
    certificate: Pem | None = None
    when: datetime


class SignedAdmission(Contract):
    """An admission with the coordinator's signature."""

    admission: Admission
    signature: Signature


class Health(Contract):
    """How a site's agent fares, in numbers and versions; nothing of its data."""

    version: Version
    started_at: datetime
    free_mb: Count
    has_gpu: bool
    certificate_days: int


class Visit(Contract):
    """What a site tells the coordinator from time to time; the same may be told twice.

    ``decisions`` are the newest ones about every plan, ``checkpoint`` how far its journal has come.
    """

    schema_version: Literal[1] = 1
    site: SiteName
    when: datetime
    decisions: Annotated[tuple[Countersignature, ...], Field(max_length=1000)] = ()
    checkpoint: SignedCheckpoint | None = None
    health: Health


StudyState = Literal["offered", "running", "finished", "failed", "closed"]


class Offer(Contract):
    """A study the coordinator offers: its signed plan, and where the study stands.

    ``plan_toml`` is the whole document, with its signature; who reads it checks that signature.
    """

    plan_toml: Annotated[str, Field(max_length=262_144)]
    state: StudyState
    num_rounds_done: Count = 0


class Receipt(Contract):
    """The coordinator has seen a site's checkpoint: neither can now tell another story."""

    schema_version: Literal[1] = 1
    site: SiteName
    checkpoint: Digest
    index: Count
    when: datetime


class SignedReceipt(Contract):
    """A receipt with the coordinator's signature."""

    receipt: Receipt
    signature: Signature


class Bulletin(Contract):
    """What the coordinator answers a visit: the studies that name the site, and a receipt."""

    schema_version: Literal[1] = 1
    site: SiteName
    when: datetime
    offers: Annotated[tuple[Offer, ...], Field(max_length=1000)] = ()
    receipt: SignedReceipt | None = None


class ProbeRequest(Contract):
    """A site measures the way to its coordinator: it sends so many bytes, then asks for so many."""

    schema_version: Literal[1] = 1
    up_bytes: ProbeBytes = 0
    down_bytes: ProbeBytes = 0


class ProbeAnswer(Contract):
    """What the coordinator says of a probe, at once and when all has come: how much, and when."""

    schema_version: Literal[1] = 1
    received_bytes: Count
    when: datetime


# --- what the coordinator keeps and publishes


class RoundRecord(Contract):
    """One line of ``rounds.jsonl``: what happened in one round."""

    schema_version: Literal[1] = 1
    round_: Count
    kind: OrderKind
    replies: tuple[SiteReply, ...]
    refusals: tuple[Refusal, ...] = ()
    validation: Evaluation | None = None
    weights_digest: Digest
    seconds: NonNegative
    sent_bytes: Count
    received_bytes: Count


class Picture(Contract):
    """A sample image of the coordinator's own held-out set with its prediction, as PNG."""

    caption: str
    png_base64: str


class ValidationReport(Contract):
    """Global validation on the coordinator's held-out set, which no site holds.

    ``baselines`` are what needs no training, and the weights before it, on the same patients;
    ``covers`` says what differential privacy covers of the task, if the study has it.
    """

    schema_version: Literal[1] = 1
    study: Digest
    weights_digest: Digest
    metrics: dict[MetricName, float]
    intervals: dict[MetricName, tuple[float, float]] = {}
    num_patients: Count
    num_images: Count
    baselines: dict[BaselineName, Evaluation] = {}
    covers: Annotated[str, Field(max_length=400)] = ""
    pictures: tuple[Picture, ...] = ()


class SiteResult(Contract):
    """One hospital's lines in the report."""

    name: SiteName
    num_patients: Count
    metrics: dict[MetricName, float]
    intervals: dict[MetricName, tuple[float, float]] = {}
    num_test_patients: Count
    alone: dict[MetricName, float] | None = None
    alone_intervals: dict[MetricName, tuple[float, float]] = {}
    epsilon: NonNegative | None = None
    delta: Probability | None = None
    unit: PrivacyUnit | None = None
    privacy: PrivacyStatement | None = None
    refusals: tuple[Refusal, ...] = ()


class RoundPoint(Contract):
    """One point on the curves."""

    round_: Count
    validation: dict[MetricName, float]
    sites: dict[SiteName, dict[MetricName, float]]
    train_loss: dict[SiteName, float]
    seconds: NonNegative
    slowest_site_seconds: NonNegative
    sent_bytes: Count
    received_bytes: Count
    refused: dict[SiteName, RefusalCode] = {}


class StudyReport(Contract):
    """``report.json``: the only thing ``report.html`` is made from."""

    schema_version: Literal[1] = 1
    study: Digest
    name: str
    purpose: str
    description: str
    task: str
    headline: MetricName
    created: datetime
    seed: int
    data: str
    plan_toml: str
    software: dict[str, str]
    is_private: bool
    sites: tuple[SiteResult, ...]
    rounds: tuple[RoundPoint, ...]
    global_: Annotated[ValidationReport, Field(alias="global")]
    model_digest: Digest
    model_bytes: Count
    seconds: NonNegative
    notes: tuple[str, ...] = ()


class ReleasedSite(Contract):
    """One hospital's part in a release: its patients, and how the model did on those kept aside."""

    num_patients: Count
    num_test_patients: Count
    metrics: dict[MetricName, float]
    intervals: dict[MetricName, tuple[float, float]] = {}


class FingerprintReport(Contract):
    """``fingerprint.json``: what the sites told under a plan that asks for a fingerprint.

    ``total`` is the sum of the replies' histograms, cell by cell.
    """

    schema_version: Literal[1] = 1
    study: Digest
    name: str
    plan_toml: str
    created: datetime
    replies: Annotated[tuple[SiteReply, ...], Field(min_length=1)]
    refusals: tuple[Refusal, ...] = ()
    total: Fingerprint
    num_patients: Count
    seconds: NonNegative


class ReleaseManifest(Contract):
    """What stands beside released weights: which study made them and how they were validated.

    ``weights_digest`` is that of all weights of the model. Where ``parts`` says how the names of
    the released ones begin, the others stay with the coordinator, and ``released_digest`` is that
    of what is released.
    ``modalities`` are those of the images it was validated on, OT where they are plain pictures;
    none if nobody knows. The coordinator's signature over it lies beside it.
    """

    schema_version: Literal[1] = 1
    study: Digest
    round_: Count
    net: str
    task: str
    weights_digest: Digest
    released_digest: Digest | None = None
    parts: tuple[str, ...] = ()
    weights_file: str
    num_parameters: Count
    strategy: str
    validation: Evaluation
    privacy: dict[SiteName, PrivacyStatement]
    intended_use: str
    sites: dict[SiteName, ReleasedSite] = {}
    modalities: tuple[Modality, ...] = ()


class AuditReport(Contract):
    """What ``consilia-audit`` found: every check with its verdict, offline."""

    schema_version: Literal[1] = 1
    subject: str
    passed: tuple[str, ...]
    failed: tuple[str, ...]


CONTRACTS: tuple[type[Contract], ...] = (
    PrivacyEvent,
    PrivacyStatement,
    Reservation,
    Commit,
    Signature,
    RoundOrder,
    Evaluation,
    Histogram,
    Fingerprint,
    SiteReply,
    Refusal,
    Approval,
    Countersignature,
    JournalEntry,
    JournalLine,
    Checkpoint,
    SignedCheckpoint,
    Invite,
    SignedInvite,
    JoinRequest,
    SignedJoinRequest,
    Admission,
    SignedAdmission,
    Health,
    Visit,
    Offer,
    Receipt,
    SignedReceipt,
    Bulletin,
    ProbeRequest,
    ProbeAnswer,
    RoundRecord,
    ValidationReport,
    StudyReport,
    FingerprintReport,
    ReleaseManifest,
    AuditReport,
)
