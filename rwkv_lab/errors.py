"""The one exception tree. Every message says what is wrong, where, and what to do, in at most three lines."""


class RwkvLabError(Exception):
    """Root of everything that rwkv_lab raises on purpose."""

    def _render_traceback_(self) -> list[str]:
        """Called by IPython instead of its own traceback: a notebook shows the message, not our stack."""
        return [f"{type(self).__name__}: {self}"]


class UnsafeFileError(RwkvLabError):
    """The file would run code, or leads outside its own folder."""


class CorruptFileError(RwkvLabError):
    """The bytes are not what their own header states: truncated, overlapping, or no checkpoint at all."""


class LayoutError(RwkvLabError):
    """Keys, shapes or generations do not fit: missing, extra, of another model, or not supported."""


class NumericsError(RwkvLabError):
    """NaN, Inf, or a value that the output dtype cannot hold."""


class ParameterError(RwkvLabError):
    """A parameter has a wrong name, type or value."""


class OutputError(RwkvLabError):
    """The output cannot be written there: it exists, is an input, does not fit on the disk, or is out of bounds."""


class KernelError(RwkvLabError):
    """A kernel that was requested cannot be built or run."""


class DeviceError(RwkvLabError):
    """A device is not there, failed, or ran out of memory."""


class HubError(RwkvLabError):
    """The Hugging Face Hub refuses, or cannot be reached."""


class HubUnreachableError(HubError):
    """The Hub was not reached, is not to be asked, or cannot answer now: it may later."""


class ExportError(RwkvLabError):
    """Root of what goes wrong in an export."""


class ModelExportException(ExportError):
    """An export that failed, in one of the parts below."""


class CheckpointValidationError(ModelExportException):
    """The checkpoint to export is missing, damaged, or still being written."""


class ModelMergeError(ModelExportException):
    """The adapter cannot be merged into the base model."""


class FormatExportError(ModelExportException):
    """A format cannot be written, or what was written is not what was asked for."""


class ValidationError(ModelExportException):
    """What was exported does not compute what the model does."""


class ONNXExportError(FormatExportError):
    """The model cannot be written as ONNX, or the file is not what was asked for."""


class TracerWarningError(ONNXExportError):
    """Tracing fixed a value or a size that must stay open.

    torch.export raises where code branches on a value, and written axes are looked at; TorchScript's tracer, which
    writes such values as constants with a TracerWarning, writes none of our graphs.
    """


class UnorderedMapError(ONNXExportError):
    """The TorchScript tracer met what it cannot trace: "unordered_map::at"."""
