"""Costs from HLO text: each value is computed by hand from the shapes in the text."""

import pytest

from vllama_jax.aot.costs import analyze, group_size, wire_bytes
from vllama_jax.aot.hlo import parse_arrays, parse_hlo

# 12 layers: x [8, 16] · w [16, 16], with the weights of a layer gathered over 4 devices from [4, 16].
LOOP = """
HloModule step, is_scheduled=true

%body (carry: (s32[], bf16[8,16], bf16[12,4,16])) -> (s32[], bf16[8,16], bf16[12,4,16]) {
  %carry = (s32[]{:T(128)}, bf16[8,16]{1,0:T(8,128)(2,1)}, /*index=2*/bf16[12,4,16]{2,1,0:T(4,128)}) parameter(0)
  %counter = s32[]{:T(128)} get-tuple-element(%carry), index=0
  %x = bf16[8,16]{1,0:T(8,128)(2,1)} get-tuple-element(%carry), index=1
  %stack = bf16[12,4,16]{2,1,0:T(4,128)} get-tuple-element(%carry), index=2
  %layer = bf16[1,4,16]{2,1,0:T(4,128)} dynamic-slice(%stack, %counter, %zero, %zero)
  %shard = bf16[4,16]{1,0:T(4,128)} bitcast(%layer)
  %start = (bf16[4,16]{1,0}, bf16[16,16]{1,0}) all-gather-start(%shard), channel_id=1, replica_groups=[2,4]<=[8]
  %w = bf16[16,16]{1,0} all-gather-done(%start)
  %y = bf16[8,16]{1,0:T(8,128)(2,1)} dot(%x, %w), lhs_contracting_dims={1}, CONFIG
  %one = s32[]{:T(128)} constant(1)
  %zero = s32[]{:T(128)} constant(0)
  %next = s32[]{:T(128)} add(%counter, %one)
  ROOT %out = (s32[]{:T(128)}, bf16[8,16]{1,0:T(8,128)(2,1)}, bf16[12,4,16]{2,1,0:T(4,128)}) tuple(%next, %y, %stack)
}

%condition (carry.1: (s32[], bf16[8,16], bf16[12,4,16])) -> pred[] {
  %carry.1 = (s32[]{:T(128)}, bf16[8,16]{1,0}, bf16[12,4,16]{2,1,0}) parameter(0)
  %counter.1 = s32[]{:T(128)} get-tuple-element(%carry.1), index=0
  %layers = s32[]{:T(128)} constant(12)
  ROOT %less = pred[]{:T(512)} compare(%counter.1, %layers), direction=LT
}

ENTRY %main (x.1: bf16[8,16], stack.1: bf16[12,4,16]) -> bf16[8,16] {
  %x.1 = bf16[8,16]{1,0:T(8,128)(2,1)} parameter(0)
  %stack.1 = bf16[12,4,16]{2,1,0:T(4,128)} parameter(1)
  %start.1 = s32[]{:T(128)} constant(0)
  %carried = (s32[]{:T(128)}, bf16[8,16]{1,0}, bf16[12,4,16]{2,1,0}) tuple(%start.1, %x.1, %stack.1)
  %loop = (s32[]{:T(128)}, bf16[8,16]{1,0}, bf16[12,4,16]{2,1,0}) while(%carried), condition=%condition, body=%body
  ROOT %last = bf16[8,16]{1,0:T(8,128)(2,1)} get-tuple-element(%loop), index=1
}
""".replace("CONFIG", 'backend_config={"estimated_cycles":"1000"}')


def test_a_loop_counts_with_its_trips():
    costs = analyze(parse_hlo(LOOP))
    assert costs.flops == 12 * 2 * 8 * 16 * 16
    assert costs.collective_bytes == {"all-gather": 12 * 16 * 16 * 2 * 3 / 4}
    assert costs.cycles == 12 * 1000
    body = next(loop for loop in costs.loops if loop.name == "body")
    assert (body.repeats, body.cycles) == (12, 12_000)
    assert body.bytes_by_group == {4: costs.collective_bytes["all-gather"]}


def test_traffic_counts_slices_and_not_whole_stacks():
    layer, weight, rows = 4 * 16 * 2, 16 * 16 * 2, 8 * 16 * 2
    sliced = 2 * layer + 3 * 4  # read and written; three scalar indices
    gathered = layer + (layer + weight)  # the shard is read; the start's type has the shard and the result
    product = rows + weight + rows
    counter = 3 * 4  # add: two operands and a result
    assert analyze(parse_hlo(LOOP)).hbm_bytes == 12 * (sliced + gathered + product + counter)


@pytest.mark.parametrize(
    ("limit", "start", "step", "direction", "trips"),
    [(12, 0, 1, "LT", 12), (12, 0, 2, "LT", 6), (13, 0, 2, "LT", 7), (12, 1, 1, "LT", 11), (12, 0, 1, "LE", 13)],
)
def test_trips_follow_from_condition_start_and_step(limit, start, step, direction, trips):
    """Windowed einsum counts by 2."""
    text = LOOP.replace("constant(12)", f"constant({limit})").replace("direction=LT", f"direction={direction}")
    text = text.replace("%one = s32[]{:T(128)} constant(1)", f"%one = s32[]{{:T(128)}} constant({step})")
    text = text.replace("%start.1 = s32[]{:T(128)} constant(0)", f"%start.1 = s32[]{{:T(128)}} constant({start})")
    assert analyze(parse_hlo(text)).cycles == trips * 1000


def test_recorded_trips_are_used():
    text = LOOP.replace("body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"5"}}')
    assert analyze(parse_hlo(text)).cycles == 5000


def test_trips_that_depend_on_data_are_given_by_the_caller():
    text = LOOP.replace("%layers = s32[]{:T(128)} constant(12)", "%layers = s32[] get-tuple-element(%carry.1), index=0")
    assert analyze(parse_hlo(text)).cycles == 1000
    assert analyze(parse_hlo(text), dynamic_trips=16).cycles == 16_000
    assert analyze(parse_hlo(text), dynamic_trips=16).divide(16).flops == 2 * 8 * 16 * 16


def test_a_collective_in_two_fusions_counts_once():
    """A TPU's asynchronous collective is in a fusion that starts it and in one that ends it, with one channel."""
    text = """
%started (p: bf16[4,16]) -> bf16[16,16] {
  %p = bf16[4,16]{1,0} parameter(0)
  ROOT %gather.1 = bf16[16,16]{1,0} all-gather(%p), channel_id=7, replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
}

%ended (p.1: bf16[4,16]) -> bf16[16,16] {
  %p.1 = bf16[4,16]{1,0} parameter(0)
  ROOT %gather.2 = bf16[16,16]{1,0} all-gather(%p.1), channel_id=7, replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
}

ENTRY %main (a: bf16[4,16]) -> bf16[16,16] {
  %a = bf16[4,16]{1,0} parameter(0)
  %f.1 = bf16[16,16]{1,0} fusion(%a), kind=kCustom, calls=%started
  ROOT %f.2 = bf16[16,16]{1,0} fusion(%a), kind=kCustom, calls=%ended
}
"""
    assert analyze(parse_hlo(text)).collective_bytes == {"all-gather": 16 * 16 * 2 * 3 / 4}


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        ("replica_groups={{0,1,2,3},{4,5,6,7}}", 4),
        ("replica_groups=[2,4]<=[8]", 4),
        ("replica_groups=[16,16]<=[16,16]T(1,0)", 16),
        ("replica_groups=mesh['data'=2,'fsdp'=16]{'fsdp'}", 16),
        ("replica_groups=mesh['data'=2,'fsdp'=16]{'data','fsdp'}", 32),
        ("source_target_pairs={{0,1},{1,0}}", 1),
    ],
)
def test_groups_of_all_forms(groups, size):
    (one,) = _entry(f"%y = f32[8]{{0}} all-reduce(%x), channel_id=1, {groups}, to_apply=%add")
    assert group_size(one) == size


@pytest.mark.parametrize(
    ("instruction", "bytes_per_chip"),
    [
        ("%y = f32[64]{0} all-gather(%x), replica_groups=[1,4]<=[4]", 64 * 4 * 3 / 4),
        ("%y = f32[4]{0} reduce-scatter(%x), replica_groups=[1,4]<=[4], to_apply=%add", 16 * 4 * 3 / 4),
        ("%y = f32[16]{0} all-reduce(%x), replica_groups=[1,4]<=[4], to_apply=%add", 2 * 16 * 4 * 3 / 4),
        ("%y = (f32[16]{0}, f32[64]{0}) all-gather-start(%x), replica_groups=[1,4]<=[4]", 64 * 4 * 3 / 4),
        ("%y = f32[16]{0} all-reduce-start(%x), replica_groups=[1,4]<=[4], to_apply=%add", 2 * 16 * 4 * 3 / 4),
        ("%y = f32[16]{0} all-to-all(%x), replica_groups=[1,4]<=[4]", 16 * 4 * 3 / 4),
        ("%y = (f32[16]{0}, f32[16]{0}, u32[], u32[]) collective-permute-start(%x), source_target_pairs={{0,1}}", 64),
    ],
)
def test_bytes_that_arrive(instruction, bytes_per_chip):
    computation = {one.name: one for one in _entry("%x = f32[16]{0} parameter(0)", instruction)}
    assert wire_bytes(computation["y"], computation) == bytes_per_chip


def test_products_written_as_convolutions():
    """A batch of 4 products [8, 16] · [16, 32], the batch a window of size 4 over dilated inputs: one tap is real."""
    plain = "%y = bf16[8,32]{1,0} convolution(%a, %b), dim_labels=bf_io->bf"
    shapes = ("%a = bf16[8,16]{1,0} parameter(0)", "%b = bf16[16,32]{1,0} parameter(1)")
    assert analyze(_module(*shapes, plain)).flops == 2 * 8 * 16 * 32
    shapes = ("%a = bf16[4,8,16]{2,1,0} parameter(0)", "%b = bf16[4,16,32]{2,1,0} parameter(1)")
    window = "window={size=4 stride=3 pad=0_0 lhs_dilate=4}"
    batched = f"%y = bf16[4,8,32]{{2,1,0}} convolution(%a, %b), {window}, dim_labels=0bf_0io->0bf"
    assert analyze(_module(*shapes, batched)).flops == 4 * 2 * 8 * 16 * 32


def test_taps_on_padding_do_not_count():
    """A window of 3 over 5 elements, padded by 1 on both sides: 13 of 15 taps are real."""
    shapes = ("%a = f32[2,5,1]{2,1,0} parameter(0)", "%b = f32[3,1,7]{2,1,0} parameter(1)")
    window = "%y = f32[2,5,7]{2,1,0} convolution(%a, %b), window={size=3 pad=1_1}, dim_labels=b0f_0io->b0f"
    assert analyze(_module(*shapes, window)).flops == 2 * 2 * 7 * 13


def test_products_in_fusions_and_kernels_that_declare_their_cost():
    text = """
%inside (p: f32[8,16], q: f32[16,4]) -> f32[8,4] {
  %p = f32[8,16]{1,0} parameter(0)
  %q = f32[16,4]{1,0} parameter(1)
  ROOT %d = f32[8,4]{1,0} dot(%p, %q), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

ENTRY %main (a: f32[8,16], b: f32[16,4]) -> f32[8,4] {
  %a = f32[8,16]{1,0} parameter(0)
  %b = f32[16,4]{1,0} parameter(1)
  %f = f32[8,4]{1,0} fusion(%a, %b), kind=kOutput, calls=%inside
  ROOT %k = f32[8,4]{1,0} custom-call(%f), custom_call_target="tpu_custom_call", backend_config=CONFIG
}
"""
    declared = '{"flops":"640","transcendentals":"0","bytes_accessed":"96","remote_bytes_transferred":"0"}'
    costs = analyze(parse_hlo(text.replace("CONFIG", f'{{"custom_call_config":{{"cost_estimate":{declared}}}}}')))
    assert costs.flops == 2 * 8 * 16 * 4 + 640
    assert (costs.loops[0].kernel_flops, costs.loops[0].kernel_bytes) == (640, 96)


def test_arrays_in_vmem_are_not_traffic():
    vmem = "%y = f32[16]{0:T(128)S(1)} negate(%x)"
    assert analyze(_module("%x = f32[16]{0:T(128)} parameter(0)", vmem)).hbm_bytes == 64
    assert analyze(_module("%x = f32[16]{0:T(128)S(1)} parameter(0)", vmem)).hbm_bytes == 0


def test_an_update_in_place_counts_the_slice():
    shapes = ("%c = f32[1024]{0} parameter(0)", "%u = f32[8]{0} parameter(1)", "%i = s32[] parameter(2)")
    update = "%y = f32[1024]{0} dynamic-update-slice(%c, %u, %i)"
    assert analyze(_module(*shapes, update)).hbm_bytes == 8 * 4 + 4 + 8 * 4


def test_types_of_half_bytes_and_nested_layouts():
    packed, nested = parse_arrays("(s4[8,2]{1,0:T(8,128)(4,1)E(4)}, pred[3]{0:T(512)(128)(4,1)S(1)})")
    assert (packed.nbytes, packed.in_hbm) == (8, True)
    assert (nested.nbytes, nested.in_hbm) == (3, False)


def test_a_text_without_an_entry_is_an_error():
    with pytest.raises(ValueError, match="no ENTRY"):
        parse_hlo("HloModule nothing")


def _module(*instructions: str):
    lines = "\n".join(
        f"  {'ROOT ' if number == len(instructions) - 1 else ''}{line}" for number, line in enumerate(instructions)
    )
    return parse_hlo(f"ENTRY %main () -> f32[] {{\n{lines}\n}}\n")


def _entry(*instructions: str):
    return list(_module(*instructions).computations["main"].values())
