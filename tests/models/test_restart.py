import logging

import families
import pytest
import tiny
import torch

from resae.models.restart import SharedPasses


def shared(lm, sites=("resid_post",)):
    points = [p for p in map(lm.hook_point, every_name(lm)) if p.site in sites]
    return SharedPasses(lm, points, tiny.ids(1, 9)), points


def every_name(lm):
    return [f"blocks.{layer}.hook_{site}" for layer in range(lm.n_layers) for site in lm.sites()]


@pytest.mark.parametrize("kind", [*families.CONFIGS, *families.UNLISTED])
def test_a_pass_started_at_any_layer_ends_as_the_whole_one_to_the_bit(kind):
    lm = families.made(kind)
    passes, points = shared(lm)
    clean = passes.clean(tiny.ids())
    assert torch.equal(clean.final, passes.unembedding.final(tiny.ids()))
    first_attention = lm.blocks[0].get_submodule(lm.family.attn_out)
    calls = []
    first_attention.register_forward_hook(lambda *_: calls.append(1))
    for point in points:
        assert passes.start([point], overwrites=False) == point
        assert torch.equal(passes.final(clean, point), clean.final)
        assert not calls  # the first block did not run
        with lm.replacing({point: lambda stream: stream.flip(1)}):
            started = passes.final(clean, point)
            assert not calls
            assert torch.equal(started, passes.final(clean, None))
            assert not torch.equal(started, clean.final)
        calls.clear()


@pytest.mark.parametrize("family", ["pythia", "gemma3", "llama"])
def test_a_pass_starts_where_the_stream_is_overwritten(family):
    lm = tiny.FAMILIES[family]()
    passes, points = shared(lm, lm.sites())
    clean = passes.clean(tiny.ids())
    whole_streams = [p for p in points if p.site == "resid_post"]
    assert passes.start(whole_streams, overwrites=True) == whole_streams[-1]
    assert passes.start(whole_streams, overwrites=False) == whole_streams[0]
    with lm.replacing({p: lambda stream: stream.cos() for p in whole_streams[:-1]}):
        assert not torch.equal(passes.final(clean, whole_streams[0]), clean.final)
        with lm.replacing({whole_streams[-1]: clean.streams[-1]}):
            assert torch.equal(passes.final(clean, None), clean.final)
    added = lm.hook_points(["blocks.1.hook_attn_out", "blocks.2.hook_attn_out"])
    # What attention adds is not the whole stream: the earlier change stays in it.
    assert passes.start(added, overwrites=True) == added[0]


def test_a_block_that_cannot_be_passed_over_is_noticed(caplog):
    lm = tiny.llama()
    beside = {}  # a state that does not pass through the stream

    def leave(_module, _args, output):
        beside["mlp"] = output

    def take(_module, _args, output):
        return output + beside.pop("mlp", 0)

    lm.blocks[0].get_submodule("mlp").register_forward_hook(leave)
    lm.blocks[3].get_submodule("mlp").register_forward_hook(take)
    with caplog.at_level(logging.WARNING):
        passes, points = shared(lm)
    assert "does not end as the whole pass" in caplog.text
    assert passes.start(points, overwrites=False) is None
    assert passes.start(points[:3], overwrites=True) is None
    assert passes.start(points, overwrites=True) == points[3]


def test_states_beside_the_stream_forbid_to_start_where_it_is_overwritten():
    lm = tiny.lime()  # each block reads the streams of all blocks before it
    passes, points = shared(lm)
    clean = passes.clean(tiny.ids())
    assert passes.start(points[:3], overwrites=True) == points[0]
    with lm.replacing({points[1]: lambda stream: stream * 2}):
        assert torch.equal(passes.final(clean, points[1]), passes.final(clean, None))
