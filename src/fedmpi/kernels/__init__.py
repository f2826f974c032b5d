"""The hot loops of the codecs, three times the same functions with the same results.

    plain   numpy, a few lines each, whole vectors: says what the others compute, and is what they are tested against
    cpu     numba, one pass over blocks that stay in cache, on one thread
    cuda    torch, for vectors on a device

Arguments, alike in all three (`cuda` takes tensors, the others arrays):

    x, residual, into   float32: v = x * scale + residual is encoded, each operation rounded; `into` takes v minus what
                        the payload decodes to. An empty residual is zero; an empty `into` is not wanted; they may be
                        one array.
    payload             uint8
    weight, accumulate  out = decoded, or out += weight * decoded, each operation rounded

Encoders return the number of bytes, or -1 where v is not finite or beyond what the format holds.

Random bits come from counters. A block of 256 elements has the seed splitmix64(key, block), of which the upper half
is taken; its element j has fmix32(seed + j * 0x9E3779B9), the finaliser of MurmurHash3, of which the upper 24 bits
are a number in [0, 1).
"""
