"""Among whom a site hides its update, and that no mask hides two."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from client import masks, peers, studies
from client.config import SiteConfig
from client.gate import Refused
from client.masks import label_of, mask_for
from shared_models.contracts import Countersignature, RoundOrder
from shared_models.errors import DocumentError
from shared_models.masking import GRID, masked, opened, public_mask_key
from shared_models.plan import SignedPlan, StudyPlan
from shared_models.signing import digest, public_key, sign

NOON = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)
NAMES = ("north", "south", "west")
KEYS = {n: Ed25519PrivateKey.from_private_bytes(n.ljust(32).encode()) for n in (*NAMES, "east")}
MASKS = {n: X25519PrivateKey.from_private_bytes(n.rjust(32).encode()) for n in (*NAMES, "east")}
STRANGER = Ed25519PrivateKey.from_private_bytes(b"s" * 32)
VALUES = np.array([0.5, -2.0, 1e-3])

Participants = dict[str, Countersignature]


class Place(NamedTuple):
    """North, which approved a plan and trusts south and west, and what all countersigned."""

    site: SiteConfig
    plan: StudyPlan
    approvals: Participants
    countersign: Callable[..., Countersignature]

    def order(self, participants: Participants | None = None, **changed: Any) -> RoundOrder:
        given = self.approvals if participants is None else participants
        fields: dict[str, Any] = {
            "study": digest(self.plan),
            "round_": 0,
            "kind": "train",
            "site": "north",
            "weights_digest": "c3" * 32,
            "participants": tuple(given.values()),
            "issued_at": NOON,
            "expires_at": NOON + timedelta(hours=1),
        }
        return RoundOrder.model_validate(fields | changed)

    def approval(self, name: str, **changed: Any) -> Countersignature:
        key = changed.pop("key", KEYS[name])
        mask_key = changed.pop("mask_key", public_mask_key(MASKS[name]))
        return self.countersign(self.plan, name, key=key, mask_key=mask_key, **changed)

    def mask(self, order: RoundOrder) -> Any:
        return mask_for(order, self.plan, self.site)

    def used(self) -> set[str]:
        """Return the labels of the masks noted as used."""
        folder = self.site.state_dir / "studies" / digest(self.plan) / "masks"
        return {file.name for file in folder.iterdir()} if folder.exists() else set()


@pytest.fixture
def place_of(
    plan_of, site_of, coordinator_key: Ed25519PrivateKey, countersign, tmp_path: Path
) -> Callable[..., Place]:
    """Return what makes such a place, with changes in its plan."""

    def make(changes: dict[str, Any] | None = None) -> Place:
        secure = {"sites": [*NAMES], "rounds.secure_aggregation": True, "rounds.quorum": 2}
        plan = plan_of(secure | {"training.steps_per_round": 1} | (changes or {}))
        site: SiteConfig = site_of(
            {"state_dir": tmp_path / "state", "policy.peers": tmp_path / "peers.toml"}
        )
        for name in ("south", "west"):
            peers.trust(site.policy.peers, name=name, key=public_key(KEYS[name]))
        signed = SignedPlan(plan, sign(plan, key=coordinator_key))
        own = studies.approve(signed, site, key=KEYS["north"], who="Dr. Reed")
        place = Place(site, plan, {"north": own}, countersign)
        return place._replace(
            approvals={"north": own} | {name: place.approval(name) for name in ("south", "west")}
        )

    return make


@pytest.fixture
def place(place_of: Callable[..., Place]) -> Place:
    return place_of()


def refused(place: Place, order: RoundOrder) -> str:
    """Return the code the order is refused with; no mask is noted as used."""
    before = place.used()
    with pytest.raises(Refused) as caught:
        place.mask(order)
    assert place.used() == before
    return caught.value.code


# --- among whom


def test_the_masks_of_all_participants_vanish_from_their_sum(place: Place) -> None:
    order = place.order()
    total = place.mask(order)(VALUES)
    assert not np.allclose(opened(total), VALUES, atol=1.0)
    public = {name: c.approval.mask_key for name, c in place.approvals.items()}
    for name in ("south", "west"):
        others = [str(key) for other, key in public.items() if other != name]
        label = label_of(order.model_copy(update={"site": name}))
        total = total + masked(VALUES, own=MASKS[name], peers=others, label=label)
    assert opened(total) == pytest.approx(3 * VALUES, abs=3 * GRID / 2)


def not_of_the_plan(place: Place) -> Participants:
    return place.approvals | {"east": place.approval("east")}


def one_of_them_twice(place: Place) -> Participants:
    return place.approvals | {"again": place.approvals["south"]}


def one_of_them_twice_with_two_keys(place: Place) -> Participants:
    other = public_mask_key(MASKS["east"])
    return place.approvals | {"again": place.approval("south", mask_key=other)}


def two_with_one_key(place: Place) -> Participants:
    key = public_mask_key(MASKS["south"])
    return place.approvals | {"west": place.approval("west", mask_key=key)}


def one_with_this_sites_own_key(place: Place) -> Participants:
    key = place.approvals["north"].approval.mask_key
    return place.approvals | {"west": place.approval("west", mask_key=key)}


def one_who_approved_another_plan(place: Place) -> Participants:
    return place.approvals | {"west": place.approval("west", study="5a" * 32)}


def one_who_refused(place: Place) -> Participants:
    return place.approvals | {"west": place.approval("west", decision="refused")}


def one_without_a_key(place: Place) -> Participants:
    return place.approvals | {"west": place.approval("west", mask_key=None)}


def fewer_than_the_quorum(place: Place) -> Participants:
    return {"north": place.approvals["north"]}


def nobody(place: Place) -> Participants:
    return {}


def all_but_this_site(place: Place) -> Participants:
    return {name: place.approvals[name] for name in ("south", "west")}


def this_site_with_another_key(place: Place) -> Participants:
    key = public_mask_key(MASKS["north"])
    return place.approvals | {"north": place.approval("north", mask_key=key)}


@pytest.mark.parametrize(
    "participants",
    [
        not_of_the_plan,
        one_of_them_twice,
        one_of_them_twice_with_two_keys,
        two_with_one_key,
        one_with_this_sites_own_key,
        one_who_approved_another_plan,
        one_who_refused,
        one_without_a_key,
        fewer_than_the_quorum,
        nobody,
        all_but_this_site,
        this_site_with_another_key,
    ],
)
def test_an_update_is_masked_among_participants_that_are_in_order(
    participants: Callable[[Place], Participants], place: Place
) -> None:
    assert refused(place, place.order(participants(place))) == "bad-order"
    place.mask(place.order())  # and it was those participants that were wrong


# --- whom it trusts


def signed_by_a_stranger(place: Place, name: str) -> Countersignature:
    return place.approval(name, key=STRANGER)


def claimed_to_be_the_peers(place: Place, name: str) -> Countersignature:
    forged = place.approval(name, key=STRANGER)
    claimed = forged.signature.model_copy(update={"key": public_key(KEYS[name])})
    return forged.model_copy(update={"signature": claimed})


def of_another_peer(place: Place, name: str) -> Countersignature:
    return place.approval(name, key=KEYS["south" if name == "west" else "west"])


def with_a_key_put_in_later(place: Place, name: str) -> Countersignature:
    other = {"mask_key": public_mask_key(MASKS["east" if name == "west" else "north"])}
    signed = place.approvals[name]
    return signed.model_copy(update={"approval": signed.approval.model_copy(update=other)})


FORGERIES = [
    signed_by_a_stranger,
    claimed_to_be_the_peers,
    of_another_peer,
    with_a_key_put_in_later,
]


@pytest.mark.parametrize("forged", FORGERIES)
def test_without_enough_trusted_peers_each_with_its_own_signature_nothing_is_masked(
    forged: Callable[[Place, str], Countersignature], place: Place
) -> None:
    both = {name: forged(place, name) for name in ("south", "west")}
    assert refused(place, place.order(place.approvals | both)) == "peers"


@pytest.mark.parametrize("forged", FORGERIES)
def test_an_untrusted_participant_counts_for_nothing_and_does_no_harm(
    forged: Callable[[Place, str], Countersignature], place: Place
) -> None:
    one = {"south": forged(place, "south")}
    assert callable(place.mask(place.order(place.approvals | one)))


@pytest.mark.parametrize(("noise_shares", "code"), [(2, None), (3, "peers")])
def test_as_many_sites_as_share_the_noise_must_be_trusted_this_one_included(
    noise_shares: int, code: str | None, place_of: Callable[..., Place]
) -> None:
    place = place_of({"rounds.quorum": 3, "privacy.noise_shares": noise_shares})
    order = place.order(place.approvals | {"west": place.approval("west", key=STRANGER)})
    if code is None:
        assert callable(place.mask(order))
    else:
        assert refused(place, order) == code


def test_a_peer_whose_key_is_no_longer_trusted_is_not_counted(place: Place) -> None:
    for name in ("south", "west"):
        peers.trust(place.site.policy.peers, name=name, key=public_key(STRANGER))
    assert refused(place, place.order()) == "peers"


def test_this_sites_own_countersignature_makes_no_trusted_peer(place: Place) -> None:
    place.site.policy.peers.unlink()
    peers.trust(place.site.policy.peers, name="north", key=public_key(KEYS["north"]))
    assert refused(place, place.order()) == "peers"


def test_peers_that_cannot_be_read_mask_nothing(place: Place) -> None:
    place.site.policy.peers.write_bytes(b"\xff")
    with pytest.raises(DocumentError):
        place.mask(place.order())
    assert place.used() == set()


def test_without_its_masking_key_the_site_masks_nothing(place: Place) -> None:
    (place.site.state_dir / "studies" / digest(place.plan) / studies.MASK_KEY).unlink()
    with pytest.raises(DocumentError, match="masking key"):
        place.mask(place.order())


# --- no mask twice

CHANGES: dict[str, Any] = {
    "schema_version": 2,
    "study": "5a" * 32,
    "round_": 1,
    "kind": "evaluate",
    "weights_digest": "d0" * 32,
    "attempt": 1,
    "participants": (),
}
OF_ONE_SITE: dict[str, Any] = {
    "site": "south",
    "issued_at": NOON + timedelta(seconds=1),
    "expires_at": NOON + timedelta(hours=2),
}


def test_every_field_of_an_order_is_thought_of() -> None:
    assert {*CHANGES, *OF_ONE_SITE} == {*RoundOrder.model_fields}


@pytest.mark.parametrize("field", OF_ONE_SITE)
def test_the_label_depends_neither_on_the_site_nor_on_the_times(field: str, place: Place) -> None:
    other = place.order().model_copy(update={field: OF_ONE_SITE[field]})
    assert label_of(other) == label_of(place.order())


@pytest.mark.parametrize("field", CHANGES)
def test_the_label_depends_on_everything_else(field: str, place: Place) -> None:
    other = place.order().model_copy(update={field: CHANGES[field]})
    assert label_of(other) != label_of(place.order())


def test_the_label_depends_on_the_order_and_the_words_of_participants(place: Place) -> None:
    turned = dict(reversed(place.approvals.items()))
    later = {"south": place.approval("south", when=NOON)}
    orders = [place.order(), place.order(turned), place.order(place.approvals | later)]
    assert len({label_of(order) for order in orders}) == 3


def test_no_mask_is_used_twice(place: Place) -> None:
    place.mask(place.order())
    assert place.used() == {label_of(place.order())}
    for again in (place.order(), place.order(expires_at=NOON + timedelta(hours=2))):
        assert refused(place, again) == "out-of-order"
    place.mask(place.order(attempt=1))
    place.mask(place.order(round_=1))
    assert len(place.used()) == 3


def test_no_mask_is_used_twice_by_an_approval_given_again(
    place: Place, coordinator_key: Ed25519PrivateKey
) -> None:
    place.mask(place.order())
    signed = SignedPlan(place.plan, sign(place.plan, key=coordinator_key))
    again = studies.approve(signed, place.site, key=KEYS["north"], who="Dr. Read")
    assert again.approval.mask_key == place.approvals["north"].approval.mask_key
    assert refused(place, place.order()) == "out-of-order"


def in_a_child(act: Callable[[], Any]) -> int:
    """Start ``act`` in a process of its own, which ends with 0, or 1 where it was refused."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads, none of which it needs
        child = os.fork()
    if child:
        return child
    try:
        act()
        os._exit(0)
    except Refused as error:
        os._exit(1 if error.code == "out-of-order" else 2)
    finally:
        os._exit(3)


def ended(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_no_mask_is_used_twice_by_many_processes_at_once(place: Place) -> None:
    for round_ in range(5):
        order = place.order(round_=round_)
        waiting, start = os.pipe()

        def wait_and_mask(order: RoundOrder = order, on: int = waiting) -> None:
            os.read(on, 1)
            place.mask(order)

        children = [in_a_child(wait_and_mask) for _ in range(6)]
        os.write(start, b"x" * len(children))
        assert sorted(ended(child) for child in children) == [0, 1, 1, 1, 1, 1]
        os.close(waiting)
        os.close(start)


@pytest.mark.parametrize("call", ["close", "fsync"])
def test_no_mask_is_used_twice_after_a_process_was_killed_while_it_noted_it(
    call: str, place: Place
) -> None:
    def killed() -> None:
        setattr(os, call, lambda _: os._exit(137))
        place.mask(place.order())

    assert ended(in_a_child(killed)) == 137
    assert refused(place, place.order()) == "out-of-order"


def test_a_process_killed_before_it_noted_a_mask_has_not_used_it(place: Place) -> None:
    def killed() -> None:
        masks._claim = lambda _: os._exit(137)
        place.mask(place.order())

    assert ended(in_a_child(killed)) == 137
    assert callable(place.mask(place.order()))


def test_a_mask_that_cannot_be_noted_on_disk_is_not_used(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space left"):
        place.mask(place.order())
