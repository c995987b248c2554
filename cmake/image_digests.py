"""A header of the size and the CRC-32 of each compiled image: image_digests.py HEADER CUBIN..."""

import sys
import zlib
from pathlib import Path

header, *cubins = map(Path, sys.argv[1:])
rows = []
for cubin in cubins:
    code = cubin.read_bytes()
    rows.append(f'    {{"{cubin.stem}", {len(code)}, {zlib.crc32(code)}u}},\n')
header.parent.mkdir(parents=True, exist_ok=True)
header.write_text(
    f"""// The images of this build; written by cmake/image_digests.py.
#pragma once
#include <array>
#include <cstddef>
#include <cstdint>

namespace jaxfp8::build {{

struct ImageDigest {{
  const char* image;
  size_t size;
  uint32_t crc32;
}};

inline constexpr std::array<ImageDigest, {len(rows)}> kImageDigests = {{{{
{"".join(rows)}}}}};

}}  // namespace jaxfp8::build
"""
)
