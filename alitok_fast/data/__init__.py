"""Images and tokens on disk, and the deterministic order in which training reads them."""

from alitok_fast.data.cache_writer import write_token_cache
from alitok_fast.data.folders import FolderImages
from alitok_fast.data.idx import IdxImages
from alitok_fast.data.order import DataOrder
from alitok_fast.data.pictures import UnreadableImageError, read_image
from alitok_fast.data.shards import merge_shards
from alitok_fast.data.sources import ImageSource, check_source, open_source, source_fingerprint
from alitok_fast.data.token_cache import TokenCache, validate_token_cache
from alitok_fast.data.transforms import cache_crops, to_tensor, train_crop

__all__ = [
    "DataOrder",
    "FolderImages",
    "IdxImages",
    "ImageSource",
    "TokenCache",
    "UnreadableImageError",
    "cache_crops",
    "check_source",
    "merge_shards",
    "open_source",
    "read_image",
    "source_fingerprint",
    "to_tensor",
    "train_crop",
    "validate_token_cache",
    "write_token_cache",
]
