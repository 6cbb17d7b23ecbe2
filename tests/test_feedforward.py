"""bench/feedforward.py: its measure against the grammar, its file against what a page may use."""

import json
import math

import pytest
import torch

from bench import feedforward

RECORD = json.loads(feedforward.RESULTS.read_text("utf8"))


class Perfect(torch.nn.Module):
    def forward(self, ids):
        return feedforward.language().predictive(ids).log()


class Uniform(torch.nn.Module):
    def forward(self, ids):
        return torch.zeros(*ids.shape, len(feedforward.language().vocab))


def test_a_perfect_reader_is_at_zero_and_a_guesser_far_above():
    assert abs(feedforward.above(Perfect())) < 1e-12
    length = feedforward.SETTINGS["length"]
    want = math.log(len(feedforward.language().vocab))
    want -= feedforward.language().floor(length).mean().item()
    assert abs(feedforward.above(Uniform()) - want) < 0.05


def test_all_networks_weigh_the_same_and_only_they_differ():
    counts = set()
    for network in feedforward.NETWORKS:
        model = feedforward.Reader(network)
        counts.add((
            sum(p.numel() for p in model.blocks[0].mlp.parameters()),
            sum(p.numel() for p in model.parameters()),
        ))  # fmt: skip
    ((of_network, _),) = counts
    assert of_network == 8 * feedforward.SETTINGS["d_model"] ** 2


def test_a_network_without_a_bend_is_one_matrix():
    mlp = feedforward.NETWORKS["no bend"](48)
    x = torch.randn(5, 48)
    want = x @ (mlp.down.weight @ mlp.up.weight).T
    torch.testing.assert_close(mlp(x), want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("network", feedforward.NETWORKS)
def test_a_reader_looks_at_nothing_that_comes_later(network):
    model, ids = feedforward.Reader(network), feedforward.texts(2, 7)[:, :20]
    changed = ids.clone()
    changed[:, 12:] = 1
    with torch.no_grad():
        before, after = model(ids), model(changed)
    torch.testing.assert_close(before[:, :12], after[:, :12])
    assert (before[:, 12:] - after[:, 12:]).abs().max() > 1e-3


def test_the_record_holds_every_run_that_the_page_reads():
    assert RECORD["settings"] == feedforward.SETTINGS
    wanted = {f"{n}, seed {s}" for n in feedforward.NETWORKS for s in feedforward.SEEDS}
    assert RECORD["runs"].keys() == wanted
    for run in RECORD["runs"].values():
        assert run["parameters"] == 18_432 and 0 < run["above"] < 1
        assert run["date"] and run["device"] and run["versions"]["torch"]
