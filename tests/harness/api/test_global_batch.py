"""However a batch is dealt out, losses, gradients and draws are those of the whole batch."""

import multiprocessing
import socket

import pytest
import torch
import torch.distributed

from harness import gather, previous, rand, randn, total
from harness.api.global_batch import BatchParts, Dropout, batch_parts

CPU = torch.device("cpu")
ROWS = torch.arange(8 * 3, dtype=torch.float64).view(8, 3).sin()


def contrast(features):
    """A loss that compares every row with every other one."""
    every = gather(features)
    return torch.logsumexp(every @ every.T, dim=1).mean()


def normalised(features):
    """A loss that divides by what it counts."""
    return total(features.square().sum()) / total(features.abs().sum())


def in_micro_batches(loss, number):
    """Loss terms and the gradient by the weight, as a trainer makes them: look ahead, then one part after the other."""
    weight = torch.eye(3, dtype=torch.float64).add(0.1).requires_grad_()
    parts, terms = BatchParts(micro_batches=number), []
    with batch_parts(parts):
        for micro_batch, rows in enumerate(ROWS.chunk(number)):
            parts.begin(micro_batch, recording=True)
            with torch.no_grad():
                loss(rows @ weight)
        parts.previous_records = parts.recorded
        for micro_batch, rows in enumerate(ROWS.chunk(number)):
            parts.begin(micro_batch)
            term = loss(rows @ weight)
            (term / number).backward()
            terms.append(float(term.detach()))
    return terms, weight.grad


@pytest.mark.parametrize("number", [2, 4])
@pytest.mark.parametrize("loss", [contrast, normalised])
def test_micro_batches_have_the_loss_and_gradient_of_the_whole_batch(loss, number):
    (whole,), slope = in_micro_batches(loss, 1)
    terms, parted = in_micro_batches(loss, number)
    assert terms == pytest.approx([whole] * number, rel=1e-12)
    torch.testing.assert_close(parted, slope)
    # Without `gather` the parts would be other losses: the comparison can fail.
    alone = torch.logsumexp(ROWS[:4] @ ROWS[:4].T, dim=1).mean()
    assert abs(float(alone) - float(torch.logsumexp(ROWS @ ROWS.T, dim=1).mean())) > 0.1


@pytest.mark.parametrize("draw", [rand, randn])
@pytest.mark.parametrize(("processes", "micro_batches"), [(2, 1), (1, 4), (2, 2)])
def test_each_part_draws_its_rows_of_what_one_process_draws(draw, processes, micro_batches):
    plain = {rand: torch.rand, randn: torch.randn}[draw]
    expected = plain(8, 5, generator=torch.Generator().manual_seed(3))
    rows = 8 // (processes * micro_batches)
    found = torch.full((8, 5), torch.nan)
    for rank in range(processes):
        parts = BatchParts(processes=processes, rank=rank, micro_batches=micro_batches)
        for micro_batch in range(micro_batches):
            parts.begin(micro_batch)
            parts.streams["method"] = torch.Generator().manual_seed(3)
            with batch_parts(parts):
                mine = draw((rows, 5), CPU, torch.Generator().manual_seed(99))
            first = (micro_batch * processes + rank) * rows  # as the module says
            found[first : first + rows] = mine
    assert torch.equal(found, expected)
    assert torch.equal(draw((8, 5), CPU, torch.Generator().manual_seed(3)), expected)


def test_dropout_does_not_depend_on_the_parts_and_keeps_the_mean():
    layer, features = Dropout(0.25), torch.ones(4, 10_000)
    torch.manual_seed(5)
    whole = layer(features)
    parts, found = BatchParts(micro_batches=2), []
    for micro_batch in range(2):
        parts.begin(micro_batch)
        parts.streams["dropout"] = torch.Generator().manual_seed(5)
        with batch_parts(parts):
            found.append(layer(features[:2]))
    assert torch.equal(torch.cat(found), whole)
    assert whole.unique().tolist() == pytest.approx([0, 1 / 0.75])
    assert float(whole.mean()) == pytest.approx(1, abs=0.02)
    assert torch.equal(layer.eval()(features), features)


def test_the_row_before_is_that_of_the_whole_batch_and_has_no_gradient():
    values = torch.arange(6.0).view(6, 1).requires_grad_()
    assert previous(values).flatten().tolist() == [5, 0, 1, 2, 3, 4]
    assert not previous(values).requires_grad
    parts, found = BatchParts(micro_batches=3), []
    with batch_parts(parts):
        for micro_batch, rows in enumerate(values.chunk(3)):
            parts.begin(micro_batch, recording=True)
            previous(rows)
        parts.previous_records = parts.recorded
        for micro_batch, rows in enumerate(values.chunk(3)):
            parts.begin(micro_batch)
            found += previous(rows).flatten().tolist()
    assert found == [5, 0, 1, 2, 3, 4]


def test_parts_end_where_they_began():
    with pytest.raises(KeyError), batch_parts(BatchParts(processes=2)):
        rand((1,), CPU)  # no stream was seeded
    assert rand((1,), CPU).shape == (1,)


def rank_of_two(rank, port, queue):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    weight = torch.eye(3, dtype=torch.float64).add(0.1).requires_grad_()
    with batch_parts(BatchParts(processes=2, rank=rank)):
        term = contrast(ROWS.chunk(2)[rank] @ weight) + normalised(ROWS.chunk(2)[rank] @ weight)
        term.backward()
    torch.distributed.all_reduce(weight.grad)
    queue.put((float(term.detach()), (weight.grad / 2).tolist()))
    torch.distributed.destroy_process_group()


def test_two_processes_have_the_loss_and_gradient_of_the_whole_batch():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["harness.runs.execute", "harness.runs.plan", "monai.networks.nets.basic_unet"])
    queue = context.Queue()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [context.Process(target=rank_of_two, args=(rank, port, queue)) for rank in range(2)]
    for process in ranks:
        process.start()
    found = [queue.get(timeout=60) for _ in ranks]
    for process in ranks:
        process.join(10)
    weight = torch.eye(3, dtype=torch.float64).add(0.1).requires_grad_()
    whole = contrast(ROWS @ weight) + normalised(ROWS @ weight)
    whole.backward()
    for term, slope in found:
        assert term == pytest.approx(float(whole.detach()), rel=1e-12)
        torch.testing.assert_close(torch.tensor(slope, dtype=torch.float64), weight.grad)
