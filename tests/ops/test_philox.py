"""Philox4x32-10 against the known answers of Random123 (kat_vectors of Salmon et al.'s distribution)."""

import pytest
import torch

from alitok_fast.ops.philox import philox4x32, split64

FULL = 0xFFFFFFFF


@pytest.mark.parametrize(
    ("key", "counter", "words"),
    [
        ((0, 0), (0, 0, 0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((FULL, FULL), (FULL, FULL, FULL, FULL), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0xA4093822, 0x299F31D0),
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_known_answers(key, counter, words):
    seed = torch.tensor(key, dtype=torch.int64)
    seed = seed[0] | seed[1] << 32
    assert tuple(int(word) for word in philox4x32(seed, *torch.tensor(counter))) == words


def test_broadcasts():
    c0, c1 = torch.arange(5), torch.arange(3)[:, None]
    zero = torch.tensor(0)
    words = torch.stack(philox4x32(torch.tensor(7), c0, c1, zero, zero))
    assert words.shape == (4, 3, 5)
    one = torch.stack(philox4x32(torch.tensor(7), c0[4], c1[2, 0], zero, zero))
    assert torch.equal(words[:, 2, 4], one)


def test_split64_of_negative_numbers():
    low, high = split64(torch.tensor([-1, 1 << 32, -(1 << 63)]))
    assert low.tolist() == [FULL, 0, 0]
    assert high.tolist() == [FULL, 1, 1 << 31]
