#include "driver/image.h"

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <fstream>
#include <iterator>

#include "build_info.h"
#include "driver/api.h"
#include "image_digests.h"

namespace jaxfp8::driver {
namespace {

bool is_whole_elf(const std::vector<char>& code) {
  constexpr size_t kHeader = 64, kSectionHeader = 64;
  constexpr uint32_t kNoBits = 8;  // a section without bytes in the file
  const auto field = [&](size_t at, auto value) {
    std::memcpy(&value, code.data() + at, sizeof(value));
    return value;
  };
  const auto inside = [&](uint64_t offset, uint64_t size) {
    return offset <= code.size() && size <= code.size() - offset;
  };
  constexpr char kMagic[] = {0x7f, 'E', 'L', 'F', 2};  // 2: 64-bit
  if (code.size() < kHeader || std::memcmp(code.data(), kMagic, sizeof(kMagic)) != 0) return false;
  uint64_t programs = field(32, uint64_t{}), sections = field(40, uint64_t{});
  uint64_t program_size = field(54, uint16_t{}), num_programs = field(56, uint16_t{});
  uint64_t section_size = field(58, uint16_t{}), num_sections = field(60, uint16_t{});
  if (!inside(programs, program_size * num_programs)) return false;
  if (!inside(sections, section_size * num_sections)) return false;
  if (num_sections != 0 && section_size < kSectionHeader) return false;
  for (uint64_t i = 0; i < num_sections; ++i) {
    size_t at = sections + i * section_size;
    if (field(at + 4, uint32_t{}) == kNoBits) continue;
    if (!inside(field(at + 24, uint64_t{}), field(at + 32, uint64_t{}))) return false;
  }
  return true;
}

// CRC-32 as zlib has it: cmake/image_digests.py.
uint32_t crc32(const std::vector<char>& bytes) {
  static constexpr auto kTable = [] {
    std::array<uint32_t, 256> table{};
    for (uint32_t i = 0; i < 256; ++i) {
      table[i] = i;
      for (int bit = 0; bit < 8; ++bit) {
        table[i] = table[i] >> 1 ^ (table[i] & 1 ? 0xedb88320u : 0);
      }
    }
    return table;
  }();
  uint32_t crc = ~0u;
  for (char byte : bytes) crc = crc >> 8 ^ kTable[(crc ^ static_cast<uint8_t>(byte)) & 0xff];
  return ~crc;
}

bool is_of_this_build(const std::string& image, const std::vector<char>& code) {
  for (const build::ImageDigest& known : build::kImageDigests) {
    if (image == known.image) return known.size == code.size() && known.crc32 == crc32(code);
  }
  return false;
}

}  // namespace

const char* nvcc_version() { return build::kNvccVersion; }

std::vector<char> read_image(const ImageDirectory& directory, const std::string& image) {
  const std::string path = directory.path + "/" + image + ".cubin";
  std::ifstream file(path, std::ios::binary);
  std::vector<char> code{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
  if (code.empty()) {
    throw UnavailableError("the compiled kernels " + image + ".cubin are not in " + directory.path +
                           (*build::kNvccVersion == '\0' ? ": this package was built without nvcc"
                                                         : ": the installation is incomplete"));
  }
  if (!is_whole_elf(code)) {
    throw UnavailableError("the compiled kernels " + path + " are damaged, " +
                           std::to_string(code.size()) +
                           " bytes that are no whole ELF file; reinstall the package");
  }
  if (directory.built && !is_of_this_build(image, code)) {
    throw UnavailableError("the compiled kernels " + path +
                           " are not those that this process's jaxfp8 was built with: the package "
                           "was changed while the process ran; restart the process, or reinstall "
                           "the package if that does not help");
  }
  return code;
}

}  // namespace jaxfp8::driver
