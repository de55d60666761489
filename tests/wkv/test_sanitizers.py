"""A short form of `make sanitize`: one kernel built with AddressSanitizer and UBSan, and what such a build finds."""

import subprocess
import sys

import pytest
import sanitize

pytestmark = pytest.mark.skipif(sanitize.sanitizer() is None, reason="g++ has no AddressSanitizer")

WKV4 = """
import torch
from rwkv_lab.wkv import wkv4
from rwkv_lab.wkv.loader import cpu_build
assert "-fsanitize=address,undefined" in cpu_build("wkv4").command
for B, T, A in ((1, 1, 1), (2, 33, 37), (3, 5, 64)):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        k, v = (torch.randn(B, T, A).to(dtype).requires_grad_() for _ in range(2))
        w, u = -torch.rand(A), torch.randn(A)
        y, state = wkv4(w, u, k, v, backend="cpu")
        (y.float().sum() + state.sum()).backward()
        right = wkv4(w.double(), u.double(), k.double(), v.double(), backend="reference")[0]
        assert (y - right).norm() <= 1e-2 * right.norm()
print("all is well")
"""
THROWN = """
import torch
from rwkv_lab.wkv import wkv4
k = torch.randn(1, 2, 3, requires_grad=True)
k.register_hook(lambda grad: 1 / 0)  # goes through C++ as an exception
y, _ = wkv4(-torch.rand(3), torch.randn(3), k, k, backend="cpu")
try:
    y.sum().backward()
except ZeroDivisionError:
    print("thrown and caught")
"""
BEYOND = """
import ctypes, torch
from rwkv_lab.wkv.cpu import library_on_torch_threads
from rwkv_lab.wkv.pointers import Span
f = library_on_torch_threads("wkv4").wkv4_forward
f.argtypes, f.restype = [*[Span] * 4, ctypes.c_int64, *[Span] * 4, *[ctypes.c_int64] * 3, ctypes.c_int], ctypes.c_int64
x = torch.zeros(1, 4, 8)
def call(A, bytes):
    one = Span(x.data_ptr(), bytes)
    return f(one, one, one, one, 0, one, one, one, Span(None, 0), 1, 4, A, 1)
assert call(8, x.nbytes) == 0 and call(9, x.nbytes) == 1 and call(-8, x.nbytes) == 1 and call(1 << 62, x.nbytes) == 1
print("refused", flush=True)
call(4096, 1 << 40)  # a caller that lies about its memory
"""


def run(code):
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=sanitize.environment(1), capture_output=True, text=True, timeout=500)


def test_an_operator_and_exceptions_of_torch_in_a_build_with_sanitizers():
    done = run(WKV4 + THROWN)  # to start takes longer than either
    assert done.returncode == 0 and done.stdout == "all is well\nthrown and caught\n", done.stderr[-3000:]


def test_sizes_that_do_not_go_together_are_refused_and_accesses_beyond_are_found():
    done = run(BEYOND)
    assert "refused" in done.stdout, done.stderr[-3000:]
    assert done.returncode != 0 and "AddressSanitizer" in done.stderr
