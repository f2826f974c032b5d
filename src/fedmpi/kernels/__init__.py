"""The codecs' kernels, in three versions of the same functions with the same results.

    plain   numpy, a few lines each, on whole vectors: the definition that the others are tested against
    cpu     numba, one pass over blocks that stay in cache, on one thread
    cuda    torch, for vectors on a device

Arguments, the same in all three (`cuda` takes tensors, the others arrays):

    x, residual, into   float32: v = x * scale + residual is encoded, each operation rounded; `into` receives v minus
                        the decoded payload. An empty residual means zero; an empty `into` means that nobody needs it;
                        residual and `into` may be the same array.
    payload             uint8
    weight, accumulate  out = decoded, or out += weight * decoded, each operation rounded

Encoders return the number of bytes, or -1 if v is not finite or too large for the format.

Random bits come from counters. A block of 256 elements is seeded with the upper half of splitmix64(key, block). Its
element j is fmix32(seed + j * 0x9E3779B9), the finaliser of MurmurHash3; the upper 24 bits are a number in [0, 1).
"""
