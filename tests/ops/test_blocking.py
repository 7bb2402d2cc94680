"""How matmuls on a CPU are cut into tasks: `_C.plan`, which depends on its arguments and the instruction set only."""

import pytest

from tinyllm.ops.backends import cpp

pytestmark = pytest.mark.skipif(cpp.library is None, reason="needs the compiled extension")

# Layer sizes of small models and of GPT-2, gradients of their weights, a batch of tokens, and single tiles.
SHAPES = [
    (768, 128, 128), (768, 512, 128), (768, 128, 512), (512, 128, 768), (1024, 512, 2048), (1024, 3072, 768),
    (1024, 768, 3072), (768, 3072, 1024), (256, 768, 768), (64, 768, 768), (1024, 50257, 768), (5, 3072, 768),
    (1, 1, 1), (7, 33, 0), (4099, 1, 64),
]  # fmt: skip


@pytest.mark.parametrize("packs_transposed_a", [False, True])
@pytest.mark.parametrize("threads", [1, 2, 3, 8, 64, 192])
@pytest.mark.parametrize("shape", SHAPES)
def test_blocks_cover_the_matrix_once(shape, threads, packs_transposed_a):
    rows, columns, _ = shape
    block_rows, row_blocks, block_columns, column_blocks = cpp.library.plan(*shape, threads, packs_transposed_a)
    assert (row_blocks - 1) * block_rows < rows <= row_blocks * block_rows
    assert (column_blocks - 1) * block_columns < columns <= column_blocks * block_columns


@pytest.mark.parametrize("threads", [2, 4, 16, 64])
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if min(shape) >= 64])
def test_threads_share_the_work_evenly(shape, threads):
    rows, columns, depth = shape
    block_rows, row_blocks, block_columns, column_blocks = cpp.library.plan(rows, columns, depth, threads)
    most = -(-row_blocks * column_blocks // threads)  # tasks of the busiest thread
    assert rows * columns >= 0.65 * threads * most * block_rows * block_columns


@pytest.mark.parametrize("threads", [2, 64])
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if min(shape) >= 256])
def test_a_part_of_b_is_used_for_many_rows(shape, threads):
    assert cpp.library.plan(*shape, threads)[0] >= 32


@pytest.mark.parametrize("threads", [1, 2, 4, 16, 64])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_transposed_a_is_not_copied_for_fewer_columns_than_another_one_is_read(shape, threads):
    assert cpp.library.plan(*shape, threads, True)[2] >= cpp.library.plan(*shape, threads)[2]


def test_two_threads_copy_a_small_transposed_a_once():
    for gradient_of_weight in [(512, 128, 768), (128, 128, 768)]:
        assert cpp.library.plan(*gradient_of_weight, 2, packs_transposed_a=True)[3] == 1


def test_a_block_of_a_fits_the_second_level_cache():
    for depth in (64, 1024, 16_384):
        block_rows, *_ = cpp.library.plan(100_000, 768, depth, 2)
        assert block_rows * depth * 4 <= 1 << 20


def test_one_thread_has_no_more_tasks_than_the_caches_ask_for():
    assert cpp.library.plan(256, 768, 768, 1)[1::2] in {(1, 1), (2, 1)}  # 256 rows are not whole tiles everywhere


def test_no_threads_are_refused():
    with pytest.raises(ValueError, match="threads is 0"):
        cpp.library.plan(10, 10, 10, 0)
