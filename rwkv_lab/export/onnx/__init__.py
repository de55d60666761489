"""Models as ONNX graphs."""

from importlib.util import find_spec

from rwkv_lab.errors import ParameterError

_PACKAGES = ("onnx", "onnx_ir", "onnxscript", "onnxruntime")


def need_packages() -> None:
    """See to it that the packages are installed that write and check graphs.

    Raises:
        ParameterError: one is missing; how to install it.
    """
    if missing := [name for name in _PACKAGES if find_spec(name) is None]:
        raise ParameterError(f"ONNX needs the package {missing[0]}.\nInstall it: pip install 'rwkv_lab[export]'")
