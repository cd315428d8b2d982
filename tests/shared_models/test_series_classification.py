"""A series is one example, and the order of its slices can be asked for."""

from __future__ import annotations

import pytest
import torch

from shared_models import nets
from shared_models.randomness import seeded
from shared_models.tasks import objection_to_loss, series

ORDER = series.make(labels="order")
ORGANS = series.make(classes=("chest", "head"))


def rising() -> torch.Tensor:
    """Return a volume (1, 6, 4, 4) whose slices grow brighter along z."""
    return torch.arange(6.0)[None, :, None, None].expand(1, 6, 4, 4).contiguous()


def test_half_of_the_volumes_are_reversed_and_the_target_says_which() -> None:
    told = []
    for seed in range(100):
        image, target = ORDER.view(rising(), torch.tensor(0), seeded(seed), True)
        assert (image[0, 0, 0, 0] > image[0, -1, 0, 0]) == bool(target)
        told.append(int(target))
    assert 30 < sum(told) < 70


def test_labels_of_classes_are_left_as_they_are() -> None:
    image, target = ORGANS.view(rising(), torch.tensor(1), seeded(0), True)
    assert torch.equal(image, rising())
    assert int(target) == 1
    assert (ORGANS.label_kind, ORDER.label_kind) == ("class", "none")
    assert ORGANS.encode_class("head") == 1


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_the_net_reads_the_slices_in_their_order(cell: str) -> None:
    params = {"spatial_dims": 3, "channels": [4], "hidden": 8, "cell": cell}
    net = nets.make("recurrent", params, seed=0, num_outputs=2)
    image = torch.randn((1, 1, 6, 8, 8), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert not torch.allclose(net(image), net(image.flip(2)), atol=1e-4)


@pytest.mark.parametrize("task", [ORDER, ORGANS])
def test_the_loss_keeps_its_contract(task: object) -> None:
    assert objection_to_loss(task, spatial_dims=3) is None  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected a net of spatial_dims = 3"):
        objection_to_loss(task, spatial_dims=2)  # type: ignore[arg-type]


def test_the_picture_shows_five_slices() -> None:
    pixels, caption = ORDER.picture(rising(), torch.tensor(1), torch.tensor([0.0, 3.0]))
    assert pixels.shape == (4, 20, 3)
    assert "predicted reversed" in caption


@pytest.mark.parametrize("params", [{"labels": "age"}, {"labels": "order", "classes": ("a", "b")}])
def test_what_makes_no_sense_is_refused(params: dict) -> None:
    with pytest.raises(ValueError, match="expected"):
        series.make(**params)
