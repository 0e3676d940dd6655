"""What a step communicates: the planned ledger against the formulas of the papers, and the ledger of a real step against the planned one.

The formulas are of whole layers. What embedding, output table and loss add is counted beside them.
"""

import pytest

from layouts import free, job_of_case, line_of, selection_here
from mpillm.layout.journal import JOURNAL
from mpillm.layout.mesh import sizes_of
from mpillm.run.plan import needs
from small_jobs import VOCABULARY, Source, job_of, trainer_of

# Sizes that every layout of this file divides, so that the formulas are exact; dp is 2 or 4 so that each axis has its own lines.
L, C, H, K, D, F, T, V = 3, 16, 4, 2, 4, 12, 8, 32
B = 4               # samples of a dp rank
FLOAT = 8           # bytes
TABLE, NORM = V * C, C
BLOCK = C * D * (2 * H + 2 * K) + 3 * C * F + 2 * NORM


def traffic_of(rank=0, model=None, train=None, **mesh):
    """{(axis, operation): (calls, bytes)} of a planned step on rank `rank`."""
    mesh = {"dp": 2, "zero": 0, **mesh}
    sizes = {axis: mesh.get(axis, 1) for axis in ("dp", "pp", "cp", "tp")}
    job = job_of("llama", mesh=mesh, train={"batch": B * sizes["dp"]} | (train or {}), model={
        "layers": L, "width": C, "heads": H, "kv_heads": K, "mlp_width": F, "context": T, "vocabulary": V} | (model or {}))
    ranks = sizes["dp"] * sizes["pp"] * sizes["cp"] * sizes["tp"]
    return {key: tuple(entry) for key, entry in needs(job, sizes_of(job.mesh, ranks), V, rank).traffic.items()}


def around(size, ranks):
    """Bytes that a rank sends to have `size` numbers summed, or gathered and scattered."""
    return 2 * (ranks - 1) * size * FLOAT // ranks


# ---- tensor and sequence parallelism --------------------------------------------------------------------------------

@pytest.mark.parametrize("tp", [2, 4])
@pytest.mark.parametrize("micro_batches", [1, 2, 4])
def test_tensor_parallelism_has_4_all_reduces_a_layer(tp, micro_batches):
    """Shoeybi et al. 2019, arXiv:1909.08053, section 3 and figure 4: two forward, two backward, each of B T C numbers."""
    traffic = traffic_of(tp=tp, sequence=False, train={"micro_batch": B // micro_batches})
    of_layers = 4 * L
    of_tables = 1 + 1                   # sum of the embeddings; gradient at the output table
    of_loss = 1                         # sums of the exponentials and target logits, (2, N); their maxima before, (N,)
    assert traffic["tp", "all_reduce"] == (micro_batches * (of_layers + of_tables + of_loss),
                                           (of_layers + of_tables) * around(B * T * C, tp) + around(2 * B * T, tp))
    assert traffic["tp", "all_reduce max"] == (micro_batches, around(B * T, tp))
    assert ("tp", "all_gather") not in traffic and ("tp", "reduce_scatter") not in traffic


@pytest.mark.parametrize("tp", [2, 4])
def test_sequence_parallelism_has_4_gathers_and_4_scatters_a_layer(tp):
    """Korthikanti et al. 2022, arXiv:2205.05198, section 4.2.2: the same bytes as tensor parallelism alone."""
    traffic = traffic_of(tp=tp)
    for operation in ("all_gather", "reduce_scatter"):
        assert traffic["tp", operation] == (4 * L + 2, (4 * L + 2) * around(B * T * C, tp) // 2)    # 2: of embedding and output table
    assert traffic["tp", "all_reduce"] == (1, around(2 * B * T, tp))                                # of the loss
    alone = traffic_of(tp=tp, sequence=False)
    assert sum(traffic["tp", name][1] for name in ("all_gather", "reduce_scatter", "all_reduce")) == alone["tp", "all_reduce"][1]


@pytest.mark.parametrize("recompute, again", [("none", 0), ("selective", 0), ("block", 2)])
def test_recompute_of_blocks_repeats_the_all_reduces_of_their_forward(recompute, again):
    traffic = traffic_of(tp=2, sequence=False, train={"recompute": recompute})
    assert traffic["tp", "all_reduce"][0] == (4 + again) * L + 3
    traffic = traffic_of(tp=2, train={"recompute": recompute})
    assert traffic["tp", "all_gather"][0] == traffic["tp", "reduce_scatter"][0] == (4 + again) * L + 2


# ---- data parallelism -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("dp", [2, 4])
@pytest.mark.parametrize("tied", [True, False])
def test_zero_sends_2_or_3_times_the_parameters(dp, tied):
    """Rajbhandari et al. 2019, arXiv:1910.02054, section 7: 2 times up to ZeRO 2, 3 times with ZeRO 3."""
    parameters = L * BLOCK + TABLE * (1 if tied else 2) + NORM
    buckets = L + 2
    half = around(parameters, dp) // 2
    count = (1, around(1, dp))          # the weight of the step's targets
    for zero in range(4):
        traffic = {key: value for key, value in traffic_of(dp=dp, zero=zero, model={"tied": tied}).items() if key[0] == "dp"}
        if zero == 0:
            assert traffic == {("dp", "all_reduce"): (buckets + count[0], 2 * half + count[1])}
            continue
        gathers, gathered = buckets, half
        if zero == 3:       # forward and backward: the input table is not needed in backward, but in the forward of the loss if tied
            gathers, gathered = 2 * buckets - (not tied), 2 * half - (not tied) * around(TABLE, dp) // 2
        assert traffic == {("dp", "all_reduce"): count, ("dp", "reduce_scatter"): (buckets, half),
                           ("dp", "all_gather"): (gathers, gathered)}


@pytest.mark.parametrize("zero, scatters, gathers", [(0, 0, 0), (1, 1, 1), (2, 4, 1), (3, 4, 8)])
def test_micro_batches_repeat_the_scatters_from_zero_2_and_the_gathers_from_zero_3(zero, scatters, gathers):
    traffic = traffic_of(zero=zero, train={"micro_batch": 1})
    half = around(L * BLOCK + TABLE + NORM, 2) // 2
    assert traffic.get(("dp", "reduce_scatter"), (0, 0))[1] == scatters * half
    assert traffic.get(("dp", "all_gather"), (0, 0))[1] == gathers * half


# ---- pipeline -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("tp, sequence", [(1, True), (2, False), (2, True)])
@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "interleaved", "zero_bubble"])
@pytest.mark.parametrize("pp", [2, 4])
def test_a_pipeline_sends_b_s_h_a_boundary_and_direction(pp, schedule, tp, sequence):
    """Narayanan et al. 2021, arXiv:2104.04473, section 3.2: b s h a micro-batch; interleaved v times as often (section 2.2.2)."""
    chunks = 2 if schedule == "interleaved" else 1
    micro_batch = 1
    message = micro_batch * T * C * FLOAT // (tp if sequence else 1)
    for stage in range(pp):
        traffic = traffic_of(rank=stage * 2 * tp, pp=pp, tp=tp, sequence=sequence, schedule=schedule, chunks=chunks,
                             train={"micro_batch": micro_batch}, model={"layers": pp * chunks})
        forward, backward = chunks - (stage == pp - 1), chunks - (stage == 0)       # boundaries behind and before its parts
        calls = B // micro_batch * (forward + backward)
        assert traffic["pp", "send"] == (calls, calls * message)
        assert traffic["pp", "receive"] == (calls, 0)


@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_table_is_summed_over_the_two_ends_of_the_pipeline(tied):
    first, middle, last = [traffic_of(rank=2 * stage, pp=3, model={"tied": tied}) for stage in range(3)]
    name = "ppxdp", "all_reduce"
    assert first.get(name) == last.get(name) == ((1, around(TABLE, 4)) if tied else None) and name not in middle


# ---- context and experts --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("cp", [2, 4])
def test_a_ring_passes_keys_and_values_twice_and_their_gradients_once(cp):
    """Liu et al. 2023, arXiv:2310.01889, section 3: a block of keys and values a step, 2 B T/cp K D numbers."""
    traffic = traffic_of(cp=cp)
    shifts = L * ((cp - 1) + (cp - 1) + cp)     # forward; backward; gradients, which go home at the end
    assert traffic["cp", "shift"] == (shifts, shifts * 2 * B * T // cp * K * D * FLOAT)


def test_ulysses_exchanges_four_times_a_layer():
    """Jacobs et al. 2023, arXiv:2309.14509, section 3.2: each all-to-all sends its array less the own part."""
    heads = (H + 2 * K) + H + (H + 2 * K + 2 * H) + (H + 2 * K)     # q, k, v; out; backward: q, k, v, out, dout; dq, dk, dv
    assert traffic_of(cp=2, cp_form="ulysses")["cp", "all_to_all"] == (4 * L, L * heads * B * T // 2 * D * FLOAT // 2)


@pytest.mark.parametrize("per_token", [1, 2])
def test_experts_exchange_the_chosen_rows_twice_forward_and_twice_backward(per_token):
    """Lepikhin et al. 2020, arXiv:2006.16668, section 3.2: k rows of C numbers a token, there and back; and the counts before."""
    experts, ep, dp = 4, 2, 4
    traffic = traffic_of(dp=dp, ep=ep, model={"experts": experts, "experts_per_token": per_token})
    rows = B * T * per_token            # where they are only planned, half of them stay
    counts = experts // ep * FLOAT
    assert traffic["ep", "all_to_all"] == (5 * L, L * (4 * rows * C * FLOAT // ep + counts))


# ---- a real step ----------------------------------------------------------------------------------------------------

@pytest.mark.ranks
@pytest.mark.parametrize("case", selection_here()[::4], ids=str)
def test_a_step_communicates_what_was_planned(group, case):
    print(line_of(case))
    job = job_of_case(case)
    trainer = trainer_of(job, group)
    before = JOURNAL.snapshot()
    trainer.train_step(1, Source(job.model.context), 0)
    found = entries_of(JOURNAL.since(before), case)
    free(trainer.mesh)
    expected = entries_of(needs(job, sizes_of(job.mesh, group.size), VOCABULARY, group.rank).traffic, case)
    keys = sorted(found.keys() | expected.keys())
    differing = {str(key): (found.get(key), expected.get(key)) for key in keys if found.get(key) != expected.get(key)}
    everywhere = {rank: lines for rank, lines in enumerate(group.collect(differing)) if lines}
    assert not everywhere, f"rank: (found, planned) in the layout\n  {line_of(case)}\n{everywhere}"


def entries_of(traffic, case):
    """{(axis, operation): [calls, bytes]}; calls alone where the bytes depend on which experts the tokens choose."""
    return {key: [entry.calls, None if case.ep > 1 and key[1] == "all_to_all" else entry.bytes] for key, entry in traffic.items()}
