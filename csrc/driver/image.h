// Files of compiled kernels.
#pragma once
#include <vector>

namespace jaxfp8::driver {

// Whether `code` is a whole 64-bit ELF file. The driver is given no size: of a truncated one it
// would read past the end.
bool is_whole_elf(const std::vector<char>& code);

}  // namespace jaxfp8::driver
