"""Every variant of every op, in the order in which a training step runs the ops, then generation.

The tables of README.md and kernels/README.md are made from VARIANTS.
"""

from typing import NamedTuple

_ALL = "fp32, tf32, bf16"
_WEIGHTS = "fp32, or bf16 weights"


class Variant(NamedTuple):
    """A way to compute an op.

    files: the .cu files that hold its kernels, `kernels` their names; test: the file in tests/ that compares it with
    the reference; text: how it works, for the tables; benchmark: the benchmark whose recorded results show that the
    variant has run on a GPU; word: a word in the name of its candidate there ("" for every char-gru candidate but the
    naive one).
    """

    op: str
    variant: str
    files: tuple[str, ...]
    kernels: tuple[str, ...]
    test: str
    precisions: str
    text: str
    benchmark: str
    word: str


_PRODUCTS = ("matmul_nn", "matmul_nt", "matmul_tn", "add_partial_sums")
_SORT = ("count_digits", "scan_digits", "place_by_digit", "sum_by_id")


def _naive(op: str, kernels: tuple[str, ...], test: str, text: str, benchmark: str) -> Variant:
    return Variant(op, "naive", ("naive.cu",), kernels, test, "fp32", text, benchmark, "naive")


VARIANTS = (
    _naive("matrix product", ("matmul",), "test_matmul.py",
           "one thread per element of C", "matmul"),
    Variant("matrix product", "multistage", ("matmul_multistage.cu",),
            ("matmul_multistage_nn", "matmul_multistage_nt", "matmul_multistage_tn"), "test_matmul.py", _ALL,
            "three stages of asynchronous copies, tiles of 192 or 256 x 128, one wave of blocks where it can be; "
            "sm_80 on", "matmul", "multistage"),
    Variant("matrix product", "tiled", ("matmul.cu",), _PRODUCTS, "test_matmul.py", _ALL,
            "two stages in shared memory, split-K where tiles are few; any size, any GPU", "matmul", "tiled"),
    _naive("input table and its gradients", ("matmul", "column_sums"), "test_input_table.py",
           "one thread per element of P, and of each gradient", "input_table_backward"),
    Variant("input table and its gradients", "products", ("matmul.cu",), (*_PRODUCTS, "column_sums"),
            "test_input_table.py", _ALL, "matrix products and column sums", "input_table_backward", ""),
    _naive("GRU forward", ("gru_forward_step",), "test_gru.py",
           "one launch per time step, one thread per row and unit", "gru_forward"),
    Variant("GRU forward", "persistent", ("gru_forward_persistent.cu",), ("gru_forward_persistent",),
            "test_gru_persistent.py", _ALL,
            "the window in one launch, W_hh on chip, batch groups, states in tagged words", "gru_forward",
            "persistent"),
    Variant("GRU forward", "stepwise", ("gru.cu",), ("gru_forward_step",), "test_gru.py", _ALL,
            "one launch per time step; product, gates and state update fused", "gru_forward", "stepwise"),
    Variant("dropout", "one pass", ("dropout.cu",), ("dropout_forward", "dropout_backward"), "test_dropout.py", "",
            "one pass over the data", "dropout_forward", ""),
    _naive("output layer, softmax, loss, dlogits", ("cross_entropy_forward", "mean_loss"), "test_cross_entropy.py",
           "one thread per position", "cross_entropy_forward"),
    Variant("output layer, softmax, loss, dlogits", "fused", ("cross_entropy.cu",),
            ("cross_entropy_forward", "mean_loss"), "test_cross_entropy.py", _ALL,
            "one launch; logits of up to 80 characters, in tf32 and bf16 also of 161 to 256, never leave the chip",
            "cross_entropy_forward", ""),
    _naive("GRU backward", ("gru_backward_step", "matmul", "column_sums", "sum_by_id"), "test_gru.py",
           "as forward; then one thread per element of each gradient", "gru_backward"),
    Variant("GRU backward", "persistent", ("gru_backward_persistent.cu",), ("gru_backward_persistent",),
            "test_gru_persistent.py", _ALL,
            "as forward; output layer fused, sums of da and of di by character on chip, split-K where that pays",
            "gru_backward", "persistent"),
    Variant("GRU backward", "stepwise", ("gru.cu", "input_table.cu"), ("gru_backward_step", *_SORT), "test_gru.py",
            _ALL, "one launch per time step, split by gate; sums of di by character after a stable radix sort "
            "of positions", "gru_backward", "stepwise"),
    _naive("global norm", ("global_norm",), "test_adam.py",
           "one thread", "global_norm"),
    Variant("global norm", "one pass", ("adam.cu",), ("square_sums", "norm_of_sums"), "test_adam.py", "",
            "one pass over the data", "global_norm", ""),
    _naive("clipping and Adam", ("adam",), "test_adam.py",
           "one thread per parameter", "adam"),
    Variant("clipping and Adam", "one pass", ("adam.cu",), ("adam",), "test_adam.py", "", "one pass over the data",
            "adam", ""),
    _naive("sampling", ("sample",), "test_sample.py",
           "one thread per text", "sample"),
    Variant("sampling", "one block per text", ("generate.cu",), ("sample",), "test_sample.py", "",
            "top-k and top-p by ranks up to 257 characters, above by digits of the threshold", "sample", ""),
    Variant("generation", "one-text", ("generate_one_text.cu",), ("generate_one_text",), "test_generate_kernels.py",
            _WEIGHTS, "one text by one layer, all characters of a call in one launch, weights in registers; states and "
            "logits in words with tags, and every block draws", "generate", "one-text"),
    Variant("generation", "persistent", ("generate_persistent.cu",), ("generate_persistent", "pack_weights"),
            "test_generate_kernels.py", _WEIGHTS,
            "all characters of a call in one launch, weights on chip, through L2 where they do not fit; the owner of a "
            "row draws; states, logits and characters in words with tags", "generate", "persistent"),
    Variant("generation", "batched", ("generate_batched.cu",), ("generate_batched",), "test_generate_batched.py",
            _WEIGHTS, "as persistent, for one layer and nine or more texts; on tensor cores (sm_80 on), fp32 by 3xTF32",
            "generate", "batched"),
    Variant("generation", "stepwise", ("generate.cu",), ("step_first", "step_upper", "output_layer", "next_character"),
            "test_generate_kernels.py", _WEIGHTS,
            "layers + 2 kernels per character, eight characters to a CUDA graph", "generate", "stepwise"),
)
