// Files of compiled kernels.
#pragma once
#include <string>
#include <vector>

namespace jaxfp8::driver {

// The folder with <image>.cubin. `built`: they are those of this build, which knows each of them by
// its digest.
struct ImageDirectory {
  std::string path;
  bool built = true;
};

// The version of nvcc that compiled this build's images; empty: it has none.
const char* nvcc_version();

// A whole ELF file: the driver is given no size, and of a truncated one it would read past the end.
// Throws UnavailableError where there is none, and where it is not this build's: an upgrade under a
// running process would have old plans meet new kernels of the same names.
std::vector<char> read_image(const ImageDirectory& directory, const std::string& image);

}  // namespace jaxfp8::driver
