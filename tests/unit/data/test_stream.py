from __future__ import annotations

import collections
import json
from collections.abc import Collection

import numpy as np
import pytest
import torch

from tubelet.core.errors import UserError
from tubelet.data.batching import batch_size, collate, plan_batches
from tubelet.data.schema import Record
from tubelet.data.stream import (
    Ahead,
    BucketStream,
    CaptionChoice,
    Cursor,
    Draw,
    PackStream,
    Stream,
    TensorSource,
    Turns,
    mix,
    permutation,
    uniform,
)

SHAPES = [(1, 4, 4), (3, 4, 4), (3, 2, 4)]


class InMemory:
    """`bad`: places whose records cannot be read."""

    def __init__(self, count: int, shapes: list[tuple[int, ...]] | None = None, bad: Collection[int] = ()) -> None:
        self.shapes, self.bad = shapes or [(1, 2, 2)] * count, bad

    def __len__(self) -> int:
        return len(self.shapes)

    def read(self, index: int) -> Record | None:
        if index in self.bad:
            return None
        captions = [{"text": f"{kind} {index}", "kind": kind} for kind in ("short", "dense", "human")]
        return Record(
            f"r{index}", {"latent": torch.full((2, *self.shapes[index]), float(index))}, {"captions": captions, "fps": 8}
        )


def tensors(count: int = 50, **settings: object) -> TensorSource:
    captions = [[{"text": f"{kind} {n}", "kind": kind} for kind in ("short", "dense", "human")] for n in range(count)]
    return TensorSource({"latent": torch.arange(float(count))[:, None]}, captions, seed=3, **settings)  # type: ignore[arg-type]


def test_the_hash_is_the_published_one() -> None:
    # splitmix64's first outputs from state 0, as Vigna's reference implementation gives them.
    assert int(mix(0)) == 0xE220A8397B1DCDAF
    assert int(mix(np.uint64(0x9E3779B97F4A7C15))) == 0x6E789E6AA1B965F4
    values = uniform(5, np.arange(100_000))
    assert values.min() >= 0.0
    assert values.max() < 1.0
    assert abs(values.mean() - 0.5) < 0.005
    assert abs(values.var() - 1 / 12) < 0.002


def test_permutations_are_whole_fixed_and_different() -> None:
    first = permutation(1000, 7, 0)
    assert sorted(first) == list(range(1000))
    assert np.array_equal(first, permutation(1000, 7, 0))
    for other in (permutation(1000, 7, 1), permutation(1000, 8, 0), np.arange(1000)):
        assert (first == other).mean() < 0.02
    assert permutation(8, 0, 0).tolist() == [0, 1, 6, 3, 5, 4, 2, 7]  # a stored order: no machine or version may change it


def test_every_item_comes_once_an_epoch_across_ragged_batches() -> None:
    cursor = Cursor(50, seed=1)
    draws = [draw for _ in range(25) for draw in cursor.take(6)]
    for epoch in range(3):
        assert sorted(draw.index for draw in draws if draw.epoch == epoch) == list(range(50))
    assert [draw.epoch for draw in draws] == sorted(draw.epoch for draw in draws)


@pytest.mark.parametrize("world", [1, 2, 3, 4, 6])
def test_the_global_sequence_does_not_depend_on_the_ranks(world: int) -> None:
    alone = Cursor(50, seed=1)
    ranks = [Cursor(50, seed=1, rank=rank, world=world) for rank in range(world)]
    for _ in range(20):
        whole = alone.take(12)
        for rank, cursor in enumerate(ranks):
            assert cursor.take(12) == whole[rank::world]
        assert {json.dumps(cursor.state()) for cursor in ranks} == {json.dumps(alone.state())}


def test_another_world_size_can_go_on() -> None:
    alone, before = Cursor(50, seed=1), Cursor(50, seed=1, rank=1, world=2)
    for _ in range(7):
        alone.take(12)
        before.take(12)
    after = [Cursor(50, seed=1, rank=rank, world=3) for rank in range(3)]
    for cursor in after:
        cursor.restore(before.state())
    whole = alone.take(12)
    assert [cursor.take(12) for cursor in after] == [whole[rank::3] for rank in range(3)]


@pytest.mark.parametrize("stop", [0, 1, 5, 13])
@pytest.mark.parametrize("kind", ["tensors", "stream", "buckets", "ahead"])
def test_a_restored_source_goes_on_exactly(kind: str, stop: int) -> None:
    def make() -> TensorSource | Stream | BucketStream | Ahead:
        if kind == "ahead":
            return Ahead(tensors(20))
        if kind == "tensors":
            return tensors(20)
        if kind == "stream":
            return Stream(InMemory(20), seed=2)
        data = InMemory(20, [SHAPES[n % 3] for n in range(20)])
        return BucketStream(data, data.shapes, seed=2, budget=60)

    whole, first, second = make(), make(), make()
    for _ in range(stop):
        whole.draw(4)
        first.draw(4)
    second.restore(json.loads(json.dumps(first.state())))
    for _ in range(12):
        one, other = whole.draw(4), second.draw(4)
        assert one["caption"] == other["caption"]
        assert torch.equal(one["latent"], other["latent"])


def test_drawing_ahead_changes_nothing_but_when() -> None:
    plain, ahead = tensors(20), Ahead(tensors(20))
    for count in (4, 4, 3, 7, 4, 4):
        one, other = plain.draw(count), ahead.draw(count)
        assert one["caption"] == other["caption"]
        assert torch.equal(one["latent"], other["latent"])
        assert plain.state() == ahead.state(), "not where the thread is, but where the batches that were handed out end"
    state = ahead.state()
    first = ahead.draw(4)
    ahead.restore(state)
    assert torch.equal(ahead.draw(4)["index"], first["index"])

    left = Ahead(plain := tensors(20))
    left.draw(4)
    left.close()
    assert plain.state() == left.state(), "what was drawn ahead is given back"

    class Torn(TensorSource):
        def draw(self, count: int) -> dict:
            raise UserError("a shard is torn")

    with pytest.raises(UserError, match="torn"):
        Ahead(Torn({"latent": torch.zeros(3, 1)})).draw(2)


def test_a_restored_source_refuses_other_data() -> None:
    state = tensors(50).state()
    with pytest.raises(UserError, match="length 50, now it is 49"):
        tensors(49).restore(state)
    with pytest.raises(UserError, match="seed 3, now it is 4"):
        Cursor(50, seed=4).restore(state)
    dataset = InMemory(0, SHAPES * 5)
    state = BucketStream(dataset, dataset.shapes, seed=3).state()
    for more, says in ({"world": 2}, "world 1, now it is 2"), ({"tokens_per_cell": 0.25}, "tokens_per_cell"):
        with pytest.raises(UserError, match=says):
            BucketStream(dataset, dataset.shapes, seed=3, **more).restore(state)  # type: ignore[arg-type]
    older = {name: value for name, value in state.items() if name not in ("world", "tokens_per_cell", "whole")}
    BucketStream(dataset, dataset.shapes, seed=3, world=2).restore(older)
    with pytest.raises(UserError, match="empty"):
        Cursor(0, seed=4)
    with pytest.raises(UserError, match="shared by 4 ranks"):
        Cursor(50, seed=4, rank=1, world=4).take(3)


def test_captions_follow_their_proportions_and_their_item() -> None:
    source = tensors(50, proportions={"short": 0.2, "dense": 0.7, "human": 0.1})
    seen: collections.Counter[str] = collections.Counter()
    for _ in range(100):
        batch = source.draw(50)
        for caption, place, index, value in zip(
            batch["caption"],
            batch["caption_index"].tolist(),
            batch["index"].tolist(),
            batch["latent"][:, 0].tolist(),
            strict=True,
        ):
            kind, number = caption.split()
            assert int(number) == index == value
            assert ("short", "dense", "human")[place] == kind
            seen[kind] += 1
    assert seen["short"] / 5000 == pytest.approx(0.2, abs=0.03)
    assert seen["dense"] / 5000 == pytest.approx(0.7, abs=0.03)
    assert seen["human"] / 5000 == pytest.approx(0.1, abs=0.03)


def test_a_missing_kind_gives_its_share_to_the_others() -> None:
    choice = CaptionChoice({"short": 0.5, "human": 0.5, "dense": 0.0}, seed=0)
    captions = [{"text": "a", "kind": "short"}, {"text": "b", "kind": "short"}, {"text": "c", "kind": "dense"}]
    picked = collections.Counter(choice.pick(captions, Draw(0, n)) for n in range(1000))
    assert picked.keys() == {0, 1}
    assert 400 < picked[0] < 600
    with pytest.raises(UserError, match="no caption of the kinds"):
        choice.pick([{"text": "c", "kind": "dense"}], Draw(0, 0))
    for wrong in ({}, {"short": 0.0}, {"short": -1.0, "dense": 2.0}):
        with pytest.raises(UserError, match="proportions"):
            CaptionChoice(wrong, 0)


def recaptioned(number: int) -> list[dict[str, str]]:
    """An original caption by one of two worlds, and two by a captioner."""
    by = [("short", ("phys", "persist")[number % 2]), ("short", "coca"), ("dense", "coca")]
    return [{"text": f"{kind}@{source} {number}", "kind": kind, "source": source} for kind, source in by]


def test_captions_of_one_source_are_drawn_in_their_proportion_anew_each_time() -> None:
    # Each record has a short caption by one of the two worlds, which thus keeps the whole of its 5 %.
    blend = {"dense@coca": 0.95, "short@phys": 0.05, "short@persist": 0.05}
    source = TensorSource(
        {"latent": torch.arange(20.0)[:, None]}, [recaptioned(n) for n in range(20)], seed=1, proportions=blend
    )
    seen: dict[int, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for _ in range(3000):
        batch = source.draw(4)
        for caption, index in zip(batch["caption"], batch["index"].tolist(), strict=True):
            seen[index][caption.split()[0]] += 1
    whole = sum(seen.values(), collections.Counter())
    assert whole["dense@coca"] / 12_000 == pytest.approx(0.95, abs=0.015)
    assert "short@coca" not in whole, "a kind by one source is not that kind by another"
    for index, counts in seen.items():
        assert set(counts) == {"dense@coca", f"short@{('phys', 'persist')[index % 2]}"}, "every item is read in every way"


def test_a_kind_without_a_source_is_that_of_all_sources() -> None:
    choice = CaptionChoice({"short": 1.0}, seed=0)
    picked = collections.Counter(choice.pick(recaptioned(0), Draw(0, n)) for n in range(1000))
    assert picked.keys() == {0, 1}
    assert 400 < picked[0] < 600
    with pytest.raises(UserError, match="no caption of the kinds dense@other"):
        CaptionChoice({"dense@other": 1.0}, seed=0).pick(recaptioned(0), Draw(0, 0))


def test_a_batch_falls_back_where_an_item_lacks_its_kind() -> None:
    blend = CaptionChoice({"short": 0.5, "dense@coca": 0.5}, seed=0)
    batches = [blend.of_batch(position) for position in range(40)]
    assert {batch.first for batch in batches} == {"short", "dense@coca"}
    own = [{"text": "a", "kind": "short", "source": "me"}]
    assert all(batch.pick(own, Draw(0, 0)) == 0 for batch in batches)


def test_a_tensor_source_gathers_and_checks_lengths() -> None:
    source = TensorSource({"a": torch.arange(10), "b": torch.arange(10).to(torch.bfloat16)}, seed=0)
    batch = source.draw(4)
    assert batch["b"].dtype == torch.bfloat16
    assert batch["a"].tolist() == batch["index"].tolist() == batch["b"].tolist()
    assert "caption" not in batch
    with pytest.raises(UserError, match="one length"):
        TensorSource({"a": torch.arange(10), "b": torch.arange(9)})


def test_a_whole_data_set_loads_into_memory() -> None:
    source = TensorSource.load(InMemory(9), ["latent"], seed=1)
    assert source.tensors["latent"].shape == (9, 2, 1, 2, 2)
    batch = source.draw(5)
    assert [caption.split()[1] for caption in batch["caption"]] == [str(n) for n in batch["index"].tolist()]
    with pytest.raises(UserError, match="no tensor 'video'"):
        TensorSource.load(InMemory(9), ["video"])
    with pytest.raises(UserError, match="BucketStream"):
        TensorSource.load(InMemory(2, [(1, 2, 2), (3, 2, 2)]), ["latent"])


def test_collate_refuses_what_does_not_stack() -> None:
    one, other = InMemory(2, [(1, 2, 2), (3, 2, 2)]).read(0), InMemory(2, [(1, 2, 2), (3, 2, 2)]).read(1)
    assert collate([one, one])["latent"].shape == (2, 2, 1, 2, 2)
    assert collate([one, one])["fps"].tolist() == [8.0, 8.0]
    with pytest.raises(UserError, match="buckets"):
        collate([one, other])
    with pytest.raises(UserError, match="different tensors"):
        collate([one, Record("x", {"other": torch.ones(1)}, {})])


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("budget", [None, 16, 100])
def test_buckets_hold_one_shape_all_items_and_the_budget(world: int, budget: int | None) -> None:
    shapes = [SHAPES[n * n % 3] for n in range(47)]
    order = permutation(47, 0, 0).tolist()
    batches = plan_batches(shapes, order, 8, budget, 1.0, world)
    seen = collections.Counter(index for batch in batches for index in batch)
    assert seen.keys() == set(range(47))
    assert sum(seen.values()) - 47 <= (world - 1) * 3
    for batch in batches:
        assert len({shapes[index] for index in batch}) == 1
        assert len(batch) % world == 0
        if len(batch) > world:
            assert len(batch) <= 8
            assert budget is None or len(batch) * np.prod(shapes[batch[0]]) <= budget
    assert batches == plan_batches(shapes, order, 8, budget, 1.0, world)


def test_leftovers_are_filled_to_whole_batches() -> None:
    shapes = [SHAPES[n * n % 3] for n in range(47)]
    order = permutation(47, 0, 0).tolist()
    batches = plan_batches(shapes, order, 8, 100, whole=True)
    assert {index for batch in batches for index in batch} == set(range(47))
    for batch in batches:
        assert len({shapes[index] for index in batch}) == 1
        assert len(batch) == batch_size(shapes[batch[0]], 8, 100)
    source = BucketStream(InMemory(47, shapes), shapes, budget=100, whole=True)
    source.draw(8)
    with pytest.raises(UserError, match="whole True, now it is False"):
        BucketStream(InMemory(47, shapes), shapes, budget=100).restore(source.state())
    old = {name: value for name, value in source.state().items() if name != "whole"}
    BucketStream(InMemory(47, shapes), shapes, budget=100).restore(old)


def test_batch_sizes() -> None:
    assert batch_size((5, 8, 8), 64, None) == 64
    assert batch_size((5, 8, 8), 64, 6400) == 20
    assert batch_size((5, 8, 8), 64, 6400, 0.25) == 64
    assert batch_size((5, 8, 8), 64, 100) == 1
    for wrong in ((0, None, 1.0), (1, 0, 1.0), (1, None, 0.0)):
        with pytest.raises(UserError, match="at least 1"):
            batch_size((1, 1, 1), *wrong)


def test_bucket_batches_are_shared_by_ranks_and_shuffled() -> None:
    data = InMemory(60, [SHAPES[n % 3] for n in range(60)])
    alone = BucketStream(data, data.shapes, seed=2, world=1)
    ranks = [BucketStream(data, data.shapes, seed=2, rank=rank, world=2) for rank in range(2)]
    shapes = []
    for _ in range(31):
        whole, parts = alone.draw(4)["key"], [rank.draw(4) for rank in ranks]
        shapes.append(tuple(parts[0]["latent"].shape[2:]))
        assert [part["key"] for part in parts] == [whole[0::2], whole[1::2]]
    assert shapes != sorted(shapes)
    with pytest.raises(UserError, match="batch size changed"):
        alone.draw(5)
    with pytest.raises(UserError, match="59 shapes"):
        BucketStream(data, data.shapes[1:])


def test_a_bad_record_of_a_bucket_is_replaced_by_one_of_its_shape() -> None:
    shapes = [SHAPES[n % 3] for n in range(30)]
    bad = {4, 13, *range(2, 30, 3)}  # some of the second shape, all of the third
    ranks = [BucketStream(InMemory(0, shapes, bad), shapes, seed=2, budget=200, rank=r, world=2) for r in range(2)]
    seen = set()
    for _ in range(12):
        parts = [rank.draw(6) for rank in ranks]
        assert parts[0]["latent"].shape == parts[1]["latent"].shape, "of one shape, as many as they would have been"
        assert ranks[0].state() == ranks[1].state()
        for part in parts:
            seen |= set(part["key"])
            for latent, caption in zip(part["latent"], part["caption"], strict=True):
                number = int(latent.flatten()[0])
                assert tuple(latent.shape[1:]) == shapes[number]
                assert caption.split()[1] == str(number)
    assert seen == {f"r{n}" for n in range(30) if n not in bad}
    with pytest.raises(UserError, match="no record of the data set can be read"):
        BucketStream(InMemory(0, shapes, range(30)), shapes, seed=2).draw(4)


def test_a_bad_record_of_a_pack_is_replaced_by_one_that_costs_no_more() -> None:
    shapes = [SHAPES[n % 3] for n in range(30)] + [(5, 4, 4)]  # 16, 48, 24 tokens, and one of 80
    tokens = [int(np.prod(shape)) for shape in shapes]
    for bad in ({30}, {1, 4, 7, 30}, set(range(0, 30, 3)), set(range(30)), set(range(1, 31))):
        stream = PackStream(InMemory(0, shapes, bad), tokens, 80, seed=4)
        for _ in range(3 * len(stream.plan(0))):
            batch = stream.draw(1)
            costs = [latent[0].numel() for latent in batch["latent"]]
            assert 0 < sum(costs) <= 80
            assert len(batch["key"]) == len(batch["caption"]) == len(costs)
            assert not {f"r{n}" for n in bad} & set(batch["key"])
    with pytest.raises(UserError, match="no record of the data set can be read"):
        PackStream(InMemory(0, shapes, range(31)), tokens, 80).draw(1)


def packs(**settings: object) -> PackStream:
    dataset = InMemory(0, [SHAPES[n % 3] for n in range(60)])
    tokens = [int(np.prod(shape)) for shape in dataset.shapes]
    return PackStream(dataset, tokens, **({"budget": 100, "seed": 4} | settings))  # type: ignore[arg-type]


def test_packs_hold_every_item_once_an_epoch_uncut_and_within_the_budget() -> None:
    stream = packs()
    for epoch in range(2):
        assert sorted(i for pack in stream.plan(epoch) for i in pack) == list(range(60))
    assert stream.plan(0) != packs(seed=5).plan(0)
    assert 0.0 <= stream.padding < 0.2
    batch = stream.draw(2)
    costs = [latent[0].numel() for latent in batch["latent"]]
    assert sum(costs) <= 200
    assert costs == sorted(costs, reverse=True), "equal sizes stand together"
    assert {tuple(latent.shape[1:]) for latent in batch["latent"]} <= set(SHAPES)
    for latent, key, caption in zip(batch["latent"], batch["key"], batch["caption"], strict=True):
        assert key == f"r{int(latent.flatten()[0])}"
        assert caption.split()[1] == key[1:]


def test_packs_resume_where_they_stopped_and_ranks_share_them() -> None:
    whole, ahead = packs(), packs()
    drawn = [whole.draw(1)["key"] for _ in range(30)]
    for _ in range(11):
        ahead.draw(1)
    state = json.loads(json.dumps(ahead.state()))
    again = packs()
    again.restore(state)
    assert [again.draw(1)["key"] for _ in range(19)] == drawn[11:]
    ranks = [packs(rank=r, world=2) for r in range(2)]
    assert [rank.draw(2)["key"] for _ in range(5) for rank in ranks] == drawn[:10], "two packs a batch, one each"
    with pytest.raises(UserError, match="2 packs cannot be shared by 3 ranks"):
        packs(rank=0, world=3).draw(2)
    with pytest.raises(UserError, match="budget"):
        packs(budget=90).restore(state)
    with pytest.raises(UserError, match="cannot hold a sample of 48"):
        packs(budget=40)


def test_sources_are_drawn_from_in_turn_and_resumed() -> None:
    def turns() -> Turns:
        return Turns([TensorSource({"x": torch.arange(n)[:, None].expand(n, n)}, seed=n) for n in (3, 5, 7)])

    source = turns()
    drawn = [source.draw(2)["x"] for _ in range(7)]
    assert [batch.shape[1] for batch in drawn] == [3, 5, 7, 3, 5, 7, 3]
    again = turns()
    for batch in drawn[:4]:
        assert torch.equal(again.draw(2)["x"], batch)
    resumed = turns()
    resumed.restore(json.loads(json.dumps(again.state())))
    for batch in drawn[4:]:
        assert torch.equal(resumed.draw(2)["x"], batch)
    with pytest.raises(UserError, match="data position was taken with sources 3, now it is 2"):
        Turns(source.sources[:2]).restore(source.state())
    with pytest.raises(UserError, match="no source to draw from"):
        Turns([])
