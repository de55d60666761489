"""The index of a folder of shards: which file of the folder holds which tensor. An index that leads out of its folder
could make a program read any file of the machine."""

from pathlib import Path, PurePosixPath

from rwkv_lab.checkpoint.json_files import read_json
from rwkv_lab.errors import LayoutError, UnsafeFileError


def shards_of(index: Path) -> dict[str, str]:
    """{tensor: path of its shard, from the folder of the index on}. Whether they are there is not looked at.

    Raises:
        CorruptFileError: no JSON object.
        LayoutError: no map of names to files.
        UnsafeFileError: a file outside the folder of the index.
    """
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(s, str) for s in weight_map.values()):
        raise LayoutError(f"{index} has no weight_map of names to files")
    inside = {shard: _inside(index, shard) for shard in dict.fromkeys(weight_map.values())}
    return {name: inside[shard] for name, shard in weight_map.items()}


def _inside(index: Path, shard: str) -> str:
    """A shard's path as an index gives it, without `./`."""
    given = PurePosixPath(shard)  # keeps `..`, which may lead anywhere behind a link
    if not given.name or not shard.isprintable():
        raise UnsafeFileError(f"{index} names the shard {shard!r}, which is no name of a file; nothing was opened")
    if given.is_absolute() or ".." in given.parts or not _stays_in(index.parent, index.parent / given):
        raise UnsafeFileError(f"{index} names the shard {shard!r}, which is outside its folder; nothing was opened")
    return str(given)


def _stays_in(folder: Path, target: Path) -> bool:
    """Whether a file lies in a folder. In the cache of the Hugging Face Hub files are links, the one way out to expect:
    from `<cache>/<repository>/snapshots/<commit>/…` to `<cache>/<repository>/blobs` or, by newer versions, to
    `<cache>/blobs`."""
    try:
        home, real = folder.resolve(), target.resolve()
    except (OSError, RuntimeError):  # links in a circle
        return False
    commit = next((place for place in (home, *home.parents) if place.parent.name == "snapshots"), None)
    stores = [] if commit is None else [commit.parents[1] / "blobs", commit.parents[2] / "blobs"]
    return any(real.is_relative_to(place) for place in (home, *stores))
