"""Images and tokens on disk, and the deterministic order in which training reads them."""

from alitok_fast.data.cache_shards import merge_shards
from alitok_fast.data.cache_writer import write_token_cache
from alitok_fast.data.encoded import EncodedImages
from alitok_fast.data.folders import FolderImages
from alitok_fast.data.hugging_face import HuggingFaceImages
from alitok_fast.data.idx import IdxImages
from alitok_fast.data.lists import ListImages
from alitok_fast.data.loader import Loader, throughput_line, to_floats
from alitok_fast.data.order import DataOrder
from alitok_fast.data.pictures import UnreadableImageError, decode_image, read_image
from alitok_fast.data.shards import ShardImages
from alitok_fast.data.skip_list import skip_samples
from alitok_fast.data.sources import ImageSource, check_source, find_source, open_source, source_fingerprint
from alitok_fast.data.token_cache import TokenCache, validate_token_cache
from alitok_fast.data.transforms import cache_crops, to_tensor, train_crop
from alitok_fast.data.workers import WorkerDiedError

__all__ = [
    "DataOrder",
    "EncodedImages",
    "FolderImages",
    "HuggingFaceImages",
    "IdxImages",
    "ImageSource",
    "ListImages",
    "Loader",
    "ShardImages",
    "TokenCache",
    "UnreadableImageError",
    "WorkerDiedError",
    "cache_crops",
    "check_source",
    "merge_shards",
    "decode_image",
    "find_source",
    "open_source",
    "read_image",
    "skip_samples",
    "source_fingerprint",
    "throughput_line",
    "to_floats",
    "to_tensor",
    "train_crop",
    "validate_token_cache",
    "write_token_cache",
]
