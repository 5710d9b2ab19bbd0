"""Content hashes of Arrow data that depend on the values alone, never on chunks, offsets or file layout."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc


def hash64(text: str) -> int:
    """Return 64 bits of BLAKE2b of ``text``: the same in every process and release."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def table_hash(table: pa.Table) -> str:
    """Return 16 hex digits over the column names, types and values of ``table``."""
    digest = hashlib.sha256()
    digest.update(str(table.num_rows).encode())
    for name in table.column_names:
        digest.update(json.dumps(name).encode())
        _update(digest, table.column(name).combine_chunks())
    return digest.hexdigest()[:16]


def array_hash(*arrays: np.ndarray[Any, Any]) -> str:
    """Return 16 hex digits over the types, shapes and values of numpy arrays."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.dtype.str}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).view(np.uint8).data)
    return digest.hexdigest()[:16]


def _update(digest: Any, array: pa.Array) -> None:
    if isinstance(array, pa.ChunkedArray):  # an empty or oversized column is not combined into one array
        array = pa.concat_arrays(array.chunks) if array.num_chunks else pa.array([], array.type)
    kind = array.type
    if pa.types.is_dictionary(kind):
        array = array.dictionary_decode()
        kind = array.type
    if pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        array = array.cast(pa.string())
        kind = array.type
    digest.update(f"{kind}:{len(array)}".encode())
    digest.update(pc.is_valid(array).cast(pa.uint8()).to_numpy(zero_copy_only=False).tobytes())
    if pa.types.is_string(kind) or pa.types.is_binary(kind):
        filled = pa.concat_arrays([array.fill_null(b"" if pa.types.is_binary(kind) else "")])
        digest.update(pc.binary_length(filled).to_numpy(zero_copy_only=False).tobytes())
        offsets = np.frombuffer(filled.buffers()[1], dtype=np.int32)[filled.offset :][: len(filled) + 1]
        if len(filled) and offsets[-1] > offsets[0]:
            digest.update(memoryview(filled.buffers()[2])[int(offsets[0]) : int(offsets[-1])])
    elif pa.types.is_boolean(kind):
        digest.update(array.fill_null(False).cast(pa.uint8()).to_numpy(zero_copy_only=False).tobytes())
    elif pa.types.is_integer(kind) or pa.types.is_floating(kind):
        digest.update(array.fill_null(0).to_numpy(zero_copy_only=False).tobytes())
    elif pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        lengths = pc.list_value_length(array).fill_null(0)
        digest.update(lengths.to_numpy(zero_copy_only=False).astype(np.int64).tobytes())
        _update(digest, pc.list_flatten(array))
    else:
        digest.update(json.dumps(array.to_pylist(), default=str).encode())
