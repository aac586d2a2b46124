"""Images and tokens on disk, and the deterministic order in which training reads them."""

from alitok_fast.data.order import DataOrder
from alitok_fast.data.sources import FolderImages, IdxImages, UnreadableImageError, open_source
from alitok_fast.data.token_cache import TokenCache, validate_token_cache, write_token_cache
from alitok_fast.data.transforms import cache_crops, to_tensor, train_crop

__all__ = [
    "DataOrder",
    "FolderImages",
    "IdxImages",
    "TokenCache",
    "UnreadableImageError",
    "cache_crops",
    "open_source",
    "to_tensor",
    "train_crop",
    "validate_token_cache",
    "write_token_cache",
]
