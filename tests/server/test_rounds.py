"""The round loop with plain functions as sites: whom it believes, and what becomes of the rest."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from typing import Any, NamedTuple

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from server import rounds
from server.rounds import Ask, Consortium, Round
from server.simulate import ask_functions
from shared_models.contracts import (
    Approval,
    Countersignature,
    Evaluation,
    Refusal,
    RoundOrder,
    RoundRecord,
    SiteReply,
)
from shared_models.errors import RunError
from shared_models.masking import GRID, LARGEST, masked, public_mask_key
from shared_models.masking import opened as sum_opened
from shared_models.plan import StudyPlan
from shared_models.signing import canonical, public_key, sign
from shared_models.signing import digest as digest_of
from shared_models.weights import Flat, digest, flatten, schema_of, unpacked, vector_of
from shared_models.wire import Letter, flat_from, seal, unseal
from strategies.averaging import fedavg

COORDINATOR = Ed25519PrivateKey.from_private_bytes(b"c" * 32)
NAMES = ("east", "north", "south", "west")
KEYS = {name: Ed25519PrivateKey.from_private_bytes(name.ljust(32).encode()) for name in NAMES}
CONSORTIUM = Consortium(COORDINATOR, {name: public_key(key) for name, key in KEYS.items()})
WEIGHTS = {"a": np.array([[1.0, 2.0]], np.float32), "b": np.array([3.0], np.float32)}
HONEST = np.array([0.5, -0.5, 1.0], np.float32)

Answer = Callable[[Letter], Letter | None]
NewPlan = Callable[..., StudyPlan]


@pytest.fixture
def plan(new_plan: NewPlan) -> StudyPlan:
    return new_plan(sites=NAMES, rounds={"quorum": 3, "deadline_s": 60.0})


def opened(letter: Letter) -> RoundOrder:
    order, _ = unseal(letter, key=public_key(COORDINATOR))
    assert isinstance(order, RoundOrder)
    return order


def reply_to(order: RoundOrder, vector: np.ndarray | None, **changes: Any) -> SiteReply:
    fields: dict[str, Any] = {
        "study": order.study,
        "round_": order.round_,
        "kind": order.kind,
        "attempt": order.attempt,
        "site": order.site,
        "num_patients": 10,
        "update_digest": None if vector is None else digest(vector),
        "seconds": 0.5,
    }
    return SiteReply.model_validate(fields | changes)


def honest(letter: Letter, *, vector: np.ndarray = HONEST, **changes: Any) -> Letter:
    order = opened(letter)
    sent = vector if order.kind == "train" else None
    return seal(reply_to(order, sent, **changes), key=KEYS[order.site], vector=sent)


def refusing(letter: Letter) -> Letter:
    order = opened(letter)
    refusal = Refusal(
        study=order.study, round_=order.round_, kind=order.kind, site=order.site, code="budget"
    )
    return seal(refusal, key=KEYS[order.site])


def asking(**others: Answer) -> Ask:
    """Return an ``ask`` whose sites are honest, but for the ones given."""
    return ask_functions({name: others.get(name, honest) for name in NAMES})  # type: ignore[dict-item]


def trained(plan: StudyPlan, ask: Ask, *, round_: int = 0) -> Round:
    return rounds.train_round(
        plan, WEIGHTS, ask, round_=round_, consortium=CONSORTIUM, strategy=fedavg(), state={}
    )


def refusals(record: RoundRecord) -> dict[str, str]:
    return {refusal.site: refusal.code for refusal in record.refusals}


def test_a_round_is_the_weighted_mean_of_what_the_sites_sent(plan: StudyPlan) -> None:
    updates = {name: np.full(3, n, np.float32) for n, name in enumerate(NAMES)}
    counts = {name: 10 * (n + 1) for n, name in enumerate(NAMES)}

    def answer(name: str) -> Answer:
        return lambda letter: honest(letter, vector=updates[name], num_patients=counts[name])

    done = trained(plan, asking(**{name: answer(name) for name in NAMES}))
    mean = np.average([0, 1, 2, 3], weights=list(counts.values()))
    assert np.allclose(flatten(done.weights), flatten(WEIGHTS) + mean)
    assert done.weights["a"].shape == (1, 2)


def test_the_record_says_who_answered_and_what_it_weighed(plan: StudyPlan) -> None:
    record = trained(plan, asking(north=refusing), round_=1).record
    assert (record.round_, record.kind) == (1, "train")
    assert [reply.site for reply in record.replies] == ["east", "south", "west"]
    assert refusals(record) == {"north": "budget"}
    order_bytes = sum(
        letter.size_bytes
        for letter in rounds.orders_for(
            plan, WEIGHTS, kind="train", round_=1, consortium=CONSORTIUM
        ).values()
    )
    assert record.sent_bytes == order_bytes
    assert record.received_bytes > 3 * HONEST.nbytes


def test_the_records_digest_is_that_of_the_new_weights(plan: StudyPlan) -> None:
    done = trained(plan, asking())
    assert done.record.weights_digest == digest(flatten(done.weights))


def test_weights_given_are_left_alone(plan: StudyPlan) -> None:
    before = flatten(WEIGHTS).copy()
    trained(plan, asking())
    assert np.array_equal(flatten(WEIGHTS), before)


def test_each_site_gets_one_signed_order_for_itself(plan: StudyPlan) -> None:
    orders = rounds.orders_for(plan, WEIGHTS, kind="train", round_=1, consortium=CONSORTIUM)
    assert list(orders) == sorted(NAMES)
    for site, letter in orders.items():
        order, vector = unseal(letter, key=public_key(COORDINATOR))
        assert isinstance(order, RoundOrder)
        assert (order.site, order.round_, order.kind) == (site, 1, "train")
        assert order.study == digest_of(plan)
        assert order.weights_digest == digest(flatten(WEIGHTS))
        assert vector is not None
        assert vector.tolist() == flatten(WEIGHTS).tolist()
        assert (order.expires_at - order.issued_at).total_seconds() == 60.0


def test_all_orders_share_one_copy_of_the_weights(plan: StudyPlan) -> None:
    orders = rounds.orders_for(plan, WEIGHTS, kind="train", round_=0, consortium=CONSORTIUM)
    assert len({id(letter.buckets) for letter in orders.values()}) == 1


# --- whom it does not believe


def with_nan(letter: Letter) -> Letter:
    return honest(letter, vector=np.array([1.0, np.nan, 1.0], np.float32))


def with_infinity(letter: Letter) -> Letter:
    return honest(letter, vector=np.array([1.0, np.inf, 1.0], np.float32))


def too_short(letter: Letter) -> Letter:
    return honest(letter, vector=HONEST[:2])


def too_long(letter: Letter) -> Letter:
    return honest(letter, vector=np.zeros(4, np.float32))


def empty(letter: Letter) -> Letter:
    return honest(letter, vector=np.zeros(0, np.float32))


def of_odd_size(letter: Letter) -> Letter:
    return honest(letter)._replace(buckets=(b"12345",))


def without_update(letter: Letter) -> Letter:
    return honest(letter)._replace(buckets=())


def with_another_update(letter: Letter) -> Letter:
    return honest(letter)._replace(buckets=((HONEST * 100).tobytes(),))


def without_digest(letter: Letter) -> Letter:
    return honest(letter, update_digest=None)


def signed_by_another(letter: Letter) -> Letter:
    order = opened(letter)
    key = KEYS["east" if order.site != "east" else "west"]
    return seal(reply_to(order, HONEST), key=key, vector=HONEST)


def claiming_the_right_key(letter: Letter) -> Letter:
    return signed_by_another(letter)._replace(key=CONSORTIUM.sites[opened(letter).site])


def signed_as_something_else(letter: Letter) -> Letter:
    """With the site's own key, but over a refusal instead of the reply."""
    order = opened(letter)
    refusal = Refusal(
        study=order.study, round_=order.round_, kind=order.kind, site=order.site, code="budget"
    )
    return honest(letter)._replace(signature=sign(refusal, key=KEYS[order.site]).value)


def edited(letter: Letter) -> Letter:
    good = honest(letter)
    return good._replace(document=good.document.replace('"num_patients":10', '"num_patients":99'))


def for_another_round(letter: Letter) -> Letter:
    return honest(letter, round_=7)


def for_another_study(letter: Letter) -> Letter:
    return honest(letter, study="9" * 64)


def for_another_kind(letter: Letter) -> Letter:
    return honest(letter, kind="evaluate")


def in_anothers_name(letter: Letter) -> Letter:
    return honest(letter, site="elsewhere")


def with_no_patients(letter: Letter) -> Letter:
    return honest(letter, num_patients=0)


def with_more_patients_than_there_are(letter: Letter) -> Letter:
    return honest(letter, num_patients=10**400)


def with_an_order(letter: Letter) -> Letter:
    return seal(opened(letter), key=KEYS[opened(letter).site], vector=HONEST)


def the_order_back(letter: Letter) -> Letter:
    return letter


def garbage(letter: Letter) -> Letter:
    return Letter("reply", "MARKED-7731", "", "", (b"1234",))


def of_an_unknown_kind(letter: Letter) -> Letter:
    return honest(letter)._replace(kind="secret")


def with_a_lone_surrogate(letter: Letter) -> Letter:
    return honest(letter)._replace(document="\ud800")


DISHONEST = [
    with_nan,
    with_infinity,
    too_short,
    too_long,
    empty,
    of_odd_size,
    without_update,
    with_another_update,
    without_digest,
    signed_by_another,
    claiming_the_right_key,
    signed_as_something_else,
    edited,
    for_another_round,
    for_another_study,
    for_another_kind,
    in_anothers_name,
    with_no_patients,
    with_more_patients_than_there_are,
    with_an_order,
    the_order_back,
    garbage,
    of_an_unknown_kind,
    with_a_lone_surrogate,
]


@pytest.mark.parametrize("answer", DISHONEST, ids=lambda f: f.__name__)
@pytest.mark.parametrize("site", ["east", "west"])
def test_a_reply_that_cannot_be_checked_is_a_bad_reply_and_changes_nothing(
    plan: StudyPlan, answer: Answer, site: str
) -> None:
    done = trained(plan, asking(**{site: answer}))
    assert refusals(done.record) == {site: "bad-reply"}
    assert np.array_equal(flatten(done.weights), flatten(WEIGHTS) + HONEST)


def test_a_silent_site_is_a_refusal_without_an_answer(plan: StudyPlan) -> None:
    done = trained(plan, asking(north=lambda _: None))
    assert refusals(done.record) == {"north": "no-answer"}
    assert np.array_equal(flatten(done.weights), flatten(WEIGHTS) + HONEST)


def test_a_refusal_keeps_its_code_and_nothing_else_of_the_sites(plan: StudyPlan) -> None:
    """A site cannot write another round, kind or name into the record by refusing."""

    def elsewhere(letter: Letter) -> Letter:
        refusal = Refusal(study="9" * 64, round_=99, kind="alone", site="x", code="policy")
        return seal(refusal, key=KEYS[opened(letter).site])

    (refusal,) = trained(plan, asking(south=elsewhere)).record.refusals
    assert refusal == Refusal(
        study=digest_of(plan), round_=0, kind="train", site="south", code="policy"
    )


def test_a_refusal_signed_by_another_is_a_bad_reply(plan: StudyPlan) -> None:
    def forged(letter: Letter) -> Letter:
        return refusing(letter)._replace(signature="0" * 128)

    assert refusals(trained(plan, asking(south=forged)).record) == {"south": "bad-reply"}


def test_one_site_of_four_moves_a_weight_no_further_than_its_share(plan: StudyPlan) -> None:
    """Averaging does not defend against lies that are finite; the bound is what it promises."""
    huge = np.full(3, 1e30, np.float32)
    done = trained(plan, asking(west=lambda letter: honest(letter, vector=huge)))
    moved = flatten(done.weights) - flatten(WEIGHTS)
    assert np.allclose(moved, huge / 4, rtol=1e-5)


# --- quorum


def test_a_round_at_the_quorum_counts(plan: StudyPlan) -> None:
    assert len(trained(plan, asking(north=refusing)).record.replies) == plan.rounds.quorum


def test_a_round_under_the_quorum_ends_the_run_with_each_sites_reason(plan: StudyPlan) -> None:
    with pytest.raises(RunError) as caught:
        trained(plan, asking(north=refusing, south=with_nan), round_=1)
    assert caught.value.objections == (
        "round 1: 2 of 4 sites, the plan needs 3",
        "north: budget",
        "south: bad-reply",
    )


def test_a_round_nobody_answers_ends_the_run_with_each_sites_reason(plan: StudyPlan) -> None:
    with pytest.raises(RunError) as caught:
        trained(plan, asking(**dict.fromkeys(NAMES, lambda _: None)))
    assert len(caught.value.objections) == 1 + len(NAMES)
    assert caught.value.objections[1] == "east: no-answer"


# --- a whole run


def evaluated(_: Any) -> Evaluation:
    return Evaluation(metrics={"auc": 0.5}, num_patients=5, num_images=5)


def run(plan: StudyPlan, ask: Ask) -> list[Round]:
    return list(
        rounds.run(
            plan,
            WEIGHTS,
            ask,
            consortium=lambda: CONSORTIUM,
            strategy=fedavg(),
            validate=evaluated,
        )
    )


def test_a_run_goes_round_after_round_from_the_weights_before(plan: StudyPlan) -> None:
    done = run(plan, asking())
    assert [each.record.round_ for each in done] == [0, 1]
    assert np.allclose(flatten(done[1].weights), flatten(WEIGHTS) + 2 * HONEST)
    assert all(each.record.validation == evaluated(None) for each in done)


def test_the_same_answers_give_the_same_model_bit_for_bit(plan: StudyPlan) -> None:
    def noisy(letter: Letter) -> Letter:
        order = opened(letter)
        seed = NAMES.index(order.site) + 10 * order.round_
        vector = np.random.default_rng(seed).normal(size=3).astype(np.float32)
        return honest(letter, vector=vector, num_patients=seed + 1)

    ask = asking(**dict.fromkeys(NAMES, noisy))
    first, second = run(plan, ask), run(plan, ask)
    assert [r.record.weights_digest for r in first] == [r.record.weights_digest for r in second]


def test_answers_are_taken_in_the_order_of_the_sites_names(plan: StudyPlan) -> None:
    asked: list[str] = []

    def noted(letter: Letter) -> Letter:
        asked.append(opened(letter).site)
        return honest(letter)

    trained(plan, asking(**dict.fromkeys(NAMES, noted)))
    assert asked == sorted(NAMES)


@pytest.mark.parametrize("kind", ["evaluate", "alone"])
def test_asking_all_aggregates_nothing(plan: StudyPlan, kind: Any) -> None:
    record = rounds.ask_all(plan, WEIGHTS, asking(), kind=kind, consortium=CONSORTIUM)
    assert record.kind == kind
    assert record.round_ == plan.training.num_rounds
    assert [reply.kind for reply in record.replies] == [kind] * 4
    assert record.weights_digest == digest(flatten(WEIGHTS))


def test_a_site_that_sends_weights_unasked_is_not_listened_to(plan: StudyPlan) -> None:
    def eager(letter: Letter) -> Letter:
        return honest(letter)._replace(buckets=(HONEST.tobytes(),))

    record = rounds.ask_all(
        plan, WEIGHTS, asking(north=eager), kind="evaluate", consortium=CONSORTIUM
    )
    assert record.weights_digest == digest(flatten(WEIGHTS))


def test_training_alone_may_take_as_long_as_all_rounds(plan: StudyPlan) -> None:
    deadlines: dict[str, float] = {}

    def ask_with(kind: str) -> Ask:
        def ask(
            letters: Mapping[str, Letter], deadline_s: float
        ) -> Iterator[tuple[str, Letter | None]]:
            deadlines[kind] = deadline_s
            yield from asking()(letters, deadline_s)

        return ask

    for kind in ("evaluate", "alone"):
        rounds.ask_all(plan, WEIGHTS, ask_with(kind), kind=kind, consortium=CONSORTIUM)  # type: ignore[arg-type]
    assert deadlines == {"evaluate": 60.0, "alone": 120.0}


# --- memory


class Bucket(bytes):
    """Counts how many updates are alive: an array read from a bucket keeps it alive."""

    alive = 0

    def __new__(cls, content: bytes) -> Bucket:
        Bucket.alive += 1
        return super().__new__(cls, content)

    def __del__(self) -> None:
        Bucket.alive -= 1


@pytest.mark.parametrize(
    "answer", [honest, with_nan, too_short, signed_by_another], ids=lambda f: f.__name__
)
def test_each_update_is_dropped_before_the_next_is_fetched(plan: StudyPlan, answer: Answer) -> None:
    alive: list[int] = []

    def watched(letter: Letter) -> Letter:
        alive.append(Bucket.alive)
        good = answer(letter)
        assert good is not None
        return good._replace(buckets=(Bucket(good.buckets[0]),))

    ask = asking(east=watched, north=watched, south=watched, west=watched)
    try:
        done: Round | None = trained(plan, ask)
    except RunError:
        done = None
    assert (done is None) == (answer is not honest)
    assert alive == [0, 0, 0, 0]
    assert Bucket.alive == 0


def test_the_updates_reach_the_strategy_without_being_copied(plan: StudyPlan) -> None:
    """One update is one bucket: what the strategy sees is a view into it."""
    order_letter = rounds.orders_for(plan, WEIGHTS, kind="train", round_=0, consortium=CONSORTIUM)[
        "north"
    ]
    letter = honest(order_letter)
    _, update = rounds.checked(
        letter, order=opened(order_letter), key=CONSORTIUM.sites["north"], weights=WEIGHTS
    )
    assert update is not None
    bucket = vector_of(flat_from(letter.buckets))
    arrays = unpacked(update, schema_of(WEIGHTS))
    assert all(np.shares_memory(value, bucket) for value in arrays.values())


def test_a_reply_is_kept_as_the_site_signed_it(plan: StudyPlan) -> None:
    sent: list[bytes] = []

    def noted(letter: Letter) -> Letter:
        good = honest(letter, train_loss=0.25)
        sent.append(good.document.encode())
        return good

    record = trained(plan, asking(**dict.fromkeys(NAMES, noted))).record
    assert [canonical(reply) for reply in record.replies] == sent


# --- secure aggregation

MASKS = {name: X25519PrivateKey.from_private_bytes(name.rjust(32).encode()) for name in NAMES}
STEP = GRID * len(NAMES) / 2


def countersigned(plan: StudyPlan, name: str) -> Countersignature:
    approval = Approval(
        study=digest_of(plan),
        site=name,
        decision="approved",
        who="Dr. Reed",
        when=datetime(2026, 3, 1, tzinfo=UTC),
        mask_key=public_mask_key(MASKS[name]),
    )
    return Countersignature(approval=approval, signature=sign(approval, key=KEYS[name]))


@pytest.fixture
def secure(new_plan: NewPlan) -> StudyPlan:
    return new_plan(
        sites=NAMES, rounds={"quorum": 2, "deadline_s": 60.0, "secure_aggregation": True}
    )


def update_of(letter: Letter) -> tuple[np.ndarray, int]:
    """Return what a site would send, and of how many patients: other numbers for each site."""
    order = opened(letter)
    number = NAMES.index(order.site)
    random = np.random.default_rng(number + 10 * order.round_)
    return random.normal(size=3).astype(np.float32), 10 * (number + 1)


def plainly(letter: Letter) -> Letter:
    vector, num_patients = update_of(letter)
    return honest(letter, vector=vector, num_patients=num_patients)


def hidden(letter: Letter, *, vector: np.ndarray | None = None, **changes: Any) -> Letter:
    """Answer as an honest site does: its update times its patients, masked among those asked."""
    order = opened(letter)
    if order.kind != "train":
        return honest(letter)
    update, num_patients = update_of(letter)
    label = order.model_dump_json(exclude={"site", "issued_at", "expires_at"})
    peers = [str(c.approval.mask_key) for c in order.participants if c.approval.site != order.site]
    if vector is None:
        exact = num_patients * update.astype(np.float64)
        vector = masked(exact, own=MASKS[order.site], peers=peers, label=label)
    fields = {"num_patients": num_patients, "is_masked": True} | changes
    return seal(reply_to(order, vector, **fields), key=KEYS[order.site], vector=vector)


def with_the_others_hidden(**others: Answer) -> Ask:
    return ask_functions({name: others.get(name, hidden) for name in NAMES})  # type: ignore[dict-item]


def consortium_of(plan: StudyPlan) -> Consortium:
    return CONSORTIUM._replace(approvals={name: countersigned(plan, name) for name in NAMES})


def summed(plan: StudyPlan, ask: Ask, *, round_: int = 0) -> Round:
    return rounds.train_round(
        plan,
        WEIGHTS,
        ask,
        round_=round_,
        consortium=consortium_of(plan),
        strategy=fedavg(),
        state={},
    )


def mean_of(*names: str) -> np.ndarray:
    """Return the mean update of those sites by patients."""
    found = []
    for name in names:
        number = NAMES.index(name)
        update = np.random.default_rng(number).normal(size=3).astype(np.float32)
        found.append((update.astype(float), 10 * (number + 1)))
    updates, counts = zip(*found, strict=True)
    return np.average(updates, axis=0, weights=counts)


def keeping(orders: list[RoundOrder], answer: Answer) -> Answer:
    def kept(letter: Letter) -> Letter | None:
        orders.append(opened(letter))
        return answer(letter)

    return kept


def test_the_sum_of_masked_updates_gives_the_weights_that_single_updates_give(
    plan: StudyPlan, secure: StudyPlan
) -> None:
    apart = trained(plan, asking(**dict.fromkeys(NAMES, plainly)))
    together = summed(secure, with_the_others_hidden())
    difference = flatten(together.weights) - flatten(apart.weights)
    assert np.abs(difference).max() <= STEP + np.spacing(np.float32(4))
    assert flatten(together.weights) == pytest.approx(flatten(WEIGHTS) + mean_of(*NAMES), abs=1e-6)
    assert [r.site for r in together.record.replies] == sorted(NAMES)
    assert all(r.is_masked for r in together.record.replies)


def test_the_coordinator_never_sees_an_update_that_is_not_masked(
    secure: StudyPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of all it opens, only the sum of all sites is near anything that was trained."""
    seen: list[np.ndarray] = []
    for name in ("unmasked", "unpacked"):
        real = getattr(rounds, name)

        def spied(vector: np.ndarray | Flat, *rest: Any, _real: Any = real) -> Any:
            seen.append(vector_of(vector) if isinstance(vector, Flat) else vector)
            return _real(vector, *rest)

        monkeypatch.setattr(rounds, name, spied)
    replies: list[Letter] = []

    def noted(letter: Letter) -> Letter:
        replies.append(hidden(letter))
        return replies[-1]

    ask = with_the_others_hidden(**dict.fromkeys(NAMES, noted))
    summed(secure, with_the_others_hidden(north=lambda _: None))  # asked again of three
    summed(secure, ask)
    assert [vector.dtype.name for vector in seen] == ["uint64", "float32"] * 2
    for letter in replies:
        (bucket,) = letter.buckets
        assert np.abs(sum_opened(np.frombuffer(bucket, "<u8"))).mean() > LARGEST


def test_each_order_of_a_secure_round_names_all_that_are_asked(
    plan: StudyPlan, secure: StudyPlan
) -> None:
    consortium = consortium_of(secure)
    for kind, expected in (("train", sorted(NAMES)), ("evaluate", []), ("alone", [])):
        orders = rounds.orders_for(secure, WEIGHTS, kind=kind, round_=0, consortium=consortium)  # type: ignore[arg-type]
        for letter in orders.values():
            assert [c.approval.site for c in opened(letter).participants] == expected
            assert opened(letter).attempt == 0
    for letter in rounds.orders_for(
        plan, WEIGHTS, kind="train", round_=0, consortium=consortium
    ).values():
        assert opened(letter).participants == ()


@pytest.mark.parametrize(
    ("answer", "code"),
    [(lambda _: None, "no-answer"), (refusing, "budget"), (garbage, "bad-reply")],
)
def test_a_round_without_one_of_its_sites_is_asked_again_of_the_others(
    answer: Answer, code: str, secure: StudyPlan
) -> None:
    orders: list[RoundOrder] = []
    answers = {name: keeping(orders, hidden) for name in NAMES} | {"south": keeping(orders, answer)}
    done = summed(secure, with_the_others_hidden(**answers))
    others = [name for name in sorted(NAMES) if name != "south"]
    asked = [(order.attempt, order.site) for order in orders]
    assert asked == [(0, name) for name in sorted(NAMES)] + [(1, name) for name in others]
    for order in orders:
        named = [c.approval.site for c in order.participants]
        assert named == (sorted(NAMES) if order.attempt == 0 else others)
    assert refusals(done.record) == {"south": code}
    assert [reply.site for reply in done.record.replies] == others
    assert flatten(done.weights) == pytest.approx(flatten(WEIGHTS) + mean_of(*others), abs=1e-6)


def test_sites_lost_one_after_the_other_are_all_recorded(secure: StudyPlan) -> None:
    def lost_at(attempt: int) -> Answer:
        return lambda letter: None if opened(letter).attempt == attempt else hidden(letter)

    done = summed(secure, with_the_others_hidden(west=lost_at(0), east=lost_at(1)))
    assert refusals(done.record) == {"west": "no-answer", "east": "no-answer"}
    assert [reply.site for reply in done.record.replies] == ["north", "south"]
    expected = flatten(WEIGHTS) + mean_of("north", "south")
    assert flatten(done.weights) == pytest.approx(expected, abs=1e-6)


def test_the_next_round_is_asked_of_the_site_that_was_missing_too(secure: StudyPlan) -> None:
    def lost_once(letter: Letter) -> Letter | None:
        order = opened(letter)
        return None if (order.round_, order.attempt) == (0, 0) else hidden(letter)

    done = list(
        rounds.run(
            secure,
            WEIGHTS,
            with_the_others_hidden(north=lost_once),
            consortium=lambda: consortium_of(secure),
            strategy=fedavg(),
            validate=evaluated,
        )
    )
    assert [len(each.record.replies) for each in done] == [3, 4]


class Aware(NamedTuple):
    """A way to ask that knows who is away."""

    ask: Ask
    gone: set[str]

    def __call__(
        self, letters: Mapping[str, Letter], deadline_s: float
    ) -> Iterator[tuple[str, Letter | None]]:
        return self.ask(letters, deadline_s)

    def away(self) -> set[str]:
        return self.gone


def test_a_site_known_to_be_away_is_not_asked_and_nobody_is_asked_twice(secure: StudyPlan) -> None:
    orders: list[RoundOrder] = []
    answers = {name: keeping(orders, hidden) for name in NAMES}
    done = summed(secure, Aware(with_the_others_hidden(**answers), {"south"}))
    others = [name for name in sorted(NAMES) if name != "south"]
    assert [(order.attempt, order.site) for order in orders] == [(0, name) for name in others]
    assert all([c.approval.site for c in o.participants] == others for o in orders)
    assert refusals(done.record) == {"south": "no-answer"}
    assert flatten(done.weights) == pytest.approx(flatten(WEIGHTS) + mean_of(*others), abs=1e-6)


def test_a_site_that_was_away_and_is_back_takes_part_in_the_next_round(secure: StudyPlan) -> None:
    gone = {"north"}
    taking_part = []
    for round_ in rounds.run(
        secure,
        WEIGHTS,
        Aware(with_the_others_hidden(), gone),
        consortium=lambda: consortium_of(secure),
        strategy=fedavg(),
        validate=evaluated,
    ):
        taking_part.append(len(round_.record.replies))
        gone.clear()
    assert taking_part == [3, 4]


def test_if_too_many_are_away_all_are_asked_and_waited_for(secure: StudyPlan) -> None:
    away = Aware(with_the_others_hidden(), {"east", "north", "south"})
    assert len(summed(secure, away).record.replies) == 4


def test_without_masks_a_site_that_is_away_is_asked_all_the_same(plan: StudyPlan) -> None:
    assert len(trained(plan, Aware(asking(), {"south"})).record.replies) == 4


def test_a_late_answer_to_an_earlier_attempt_is_refused(secure: StudyPlan) -> None:
    first: dict[str, Letter] = {}

    def late(letter: Letter) -> Letter:
        order = opened(letter)
        first.setdefault(order.site, hidden(letter))
        return first[order.site]

    with pytest.raises(RunError, match="east: bad-reply"):
        summed(secure, with_the_others_hidden(north=lambda _: None, east=late, south=late))


def test_what_was_sent_and_received_counts_every_attempt(secure: StudyPlan) -> None:
    sent, received = list[int](), list[int]()

    def counting(answer: Answer) -> Answer:
        def counted(letter: Letter) -> Letter | None:
            sent.append(letter.size_bytes)
            said = answer(letter)
            received.append(0 if said is None else said.size_bytes)
            return said

        return counted

    answers = {name: counting(hidden) for name in NAMES} | {"south": counting(refusing)}
    record = summed(secure, with_the_others_hidden(**answers)).record
    assert len(sent) == 4 + 3
    assert record.sent_bytes == sum(sent)
    assert record.received_bytes == sum(received)


def test_fewer_than_the_quorum_left_end_the_run_with_each_sites_reason(secure: StudyPlan) -> None:
    orders: list[RoundOrder] = []

    def lost_later(letter: Letter) -> Letter | None:
        orders.append(opened(letter))
        return None if opened(letter).attempt else hidden(letter)

    with pytest.raises(RunError) as caught:
        summed(
            secure,
            with_the_others_hidden(east=refusing, north=lost_later, west=garbage, south=lost_later),
            round_=1,
        )
    assert caught.value.objections == (
        "round 1: 0 of 4 sites, the plan needs 2",
        "east: budget",
        "west: bad-reply",
        "north: no-answer",
        "south: no-answer",
    )
    assert max(order.attempt for order in orders) == 1


def not_masked(letter: Letter) -> Letter:
    return plainly(letter)


def said_to_be_masked(letter: Letter) -> Letter:
    """Say that an update of the plain kind is masked."""
    return hidden(letter, vector=HONEST)


def masked_but_too_short(letter: Letter) -> Letter:
    return hidden(letter, vector=np.zeros(2, np.uint64))


def masked_but_too_long(letter: Letter) -> Letter:
    return hidden(letter, vector=np.zeros(4, np.uint64))


def masked_but_not_what_it_announces(letter: Letter) -> Letter:
    return hidden(letter)._replace(buckets=(np.ones(3, np.uint64).tobytes(),))


def masked_but_without_its_update(letter: Letter) -> Letter:
    return hidden(letter)._replace(buckets=())


def masked_but_of_odd_size(letter: Letter) -> Letter:
    return hidden(letter)._replace(buckets=(b"123456789012",))


def masked_but_of_no_patients(letter: Letter) -> Letter:
    return hidden(letter, num_patients=0)


@pytest.mark.parametrize(
    "answer",
    [
        not_masked,
        said_to_be_masked,
        masked_but_too_short,
        masked_but_too_long,
        masked_but_not_what_it_announces,
        masked_but_without_its_update,
        masked_but_of_odd_size,
        masked_but_of_no_patients,
    ],
)
def test_a_masked_reply_that_cannot_be_checked_is_a_bad_reply_and_changes_nothing(
    answer: Answer, secure: StudyPlan
) -> None:
    done = summed(secure, with_the_others_hidden(west=answer))
    assert refusals(done.record) == {"west": "bad-reply"}
    expected = flatten(WEIGHTS) + mean_of("east", "north", "south")
    assert flatten(done.weights) == pytest.approx(expected, abs=1e-6)


def test_a_masked_reply_under_a_plan_without_secure_aggregation_is_a_bad_reply(
    plan: StudyPlan,
) -> None:
    def hiding(letter: Letter) -> Letter:
        return hidden(letter, vector=np.ones(3, np.uint64))

    done = trained(plan, asking(west=hiding))
    assert refusals(done.record) == {"west": "bad-reply"}
    assert np.array_equal(flatten(done.weights), flatten(WEIGHTS) + HONEST)


# --- the moving average


def test_the_average_of_the_models_is_validated_and_released_and_not_trained_from(
    new_plan: NewPlan,
) -> None:
    training = new_plan().training.model_dump() | {"num_rounds": 4}
    plan = new_plan(
        sites=NAMES, rounds={"quorum": 3, "deadline_s": 60.0, "averaging": 0.25}, training=training
    )
    validated: list[float] = []

    def validate(weights: Any) -> Evaluation:
        validated.append(float(weights["b"][0]))
        return evaluated(weights)

    done = list(
        rounds.run(
            plan,
            WEIGHTS,
            asking(),
            consortium=lambda: CONSORTIUM,
            strategy=fedavg(),
            validate=validate,
        )
    )
    # b begins at 3 and moves by 1 a round; the decay is 1/10, 2/11, 3/12 and then 1/4
    assert [float(each.weights["b"][0]) for each in done] == [4.0, 5.0, 6.0, 7.0]
    first = 0.1 * 3 + 0.9 * 4
    second = 2 / 11 * first + 9 / 11 * 5
    third = 0.25 * second + 0.75 * 6
    expected = [first, second, third, 0.25 * third + 0.75 * 7]
    assert validated == pytest.approx(expected, rel=1e-6)
    assert [float(each.released["b"][0]) for each in done] == validated
    for each in done:
        assert each.record.weights_digest == digest(flatten(each.released))


def test_without_averaging_the_last_model_is_released(plan: StudyPlan) -> None:
    for each in run(plan, asking()):
        assert np.array_equal(flatten(each.released), flatten(each.weights))


def test_averaging_keeps_float32_and_leaves_its_arguments_alone() -> None:
    one, two = ({"a": np.full(3, value, np.float32)} for value in (1.0, 2.0))
    found = rounds.averaged(one, two, decay=0.5, round_=99)
    assert found["a"].dtype == np.float32
    assert found["a"].tolist() == [1.5] * 3
    assert (one["a"][0], two["a"][0]) == (1.0, 2.0)
