#include "driver/image.h"

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace jaxfp8::driver {

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
  if (code.size() < kHeader || std::memcmp(code.data(),
                                           "\x7f"
                                           "ELF\x02",
                                           5) != 0)
    return false;
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

}  // namespace jaxfp8::driver
