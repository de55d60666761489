"""The zip that `torch.save` writes."""

from rwkv_lab.checkpoint.format import Format, Header, register
from rwkv_lab.checkpoint.torch_zip import read_torch_zip

register(
    Format(
        name="pth",
        described="a torch checkpoint",
        suffixes=(".pth", ".pt", ".bin", ".ckpt"),
        recognise=lambda head, size: head.startswith(b"PK\x03\x04"),
        read=lambda file: Header(*read_torch_zip(file)),
    )
)
