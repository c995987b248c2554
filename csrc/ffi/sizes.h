// The symbols of a call's shapes, and what the contract binds them to.
#pragma once
#include <array>
#include <cstdint>
#include <string>

#include "ffi/contract.h"
#include "host/checks.h"

namespace jaxfp8 {

constexpr Dim G = Dim::kG, M = Dim::kM, N = Dim::kN, K = Dim::kK, T = Dim::kT,
              OneOrG = Dim::kOneOrG, F = Dim::kF, A = Dim::kA, S = Dim::kS, J = Dim::kJ,
              MB = Dim::kMBlocks, NB = Dim::kNBlocks, KB = Dim::kKBlocks, FB = Dim::kFBlocks,
              TB = Dim::kTBlocks, PaddedM = Dim::kPaddedM;

constexpr size_t kNumBoundDims = 10;  // the symbols that a call binds come first in Dim

// The sizes of a call's symbols; 0: not bound yet.
class Sizes {
 public:
  int64_t operator[](Dim dim) const {
    switch (dim) {
      case Dim::kMBlocks:
        return ceil_div((*this)[M], kBlock);
      case Dim::kNBlocks:
        return ceil_div((*this)[N], kBlock);
      case Dim::kKBlocks:
        return ceil_div((*this)[K], kBlock);
      case Dim::kFBlocks:
        return ceil_div((*this)[F], kBlock);
      case Dim::kTBlocks:
        return ((*this)[T] != 0 ? (*this)[T] : (*this)[PaddedM]) / kBlock;
      case Dim::kPaddedM:
        return ceil_div((*this)[M], kBlock) * kBlock + kBlock * (*this)[G];
      default:
        return bound_[static_cast<size_t>(dim)];
    }
  }

  // Binds `dim` or compares it.
  bool matches(Dim dim, int64_t size) {
    size_t i = static_cast<size_t>(dim);
    if (i < kNumBoundDims && bound_[i] == 0) bound_[i] = size;
    return (*this)[dim] == size;
  }

  std::string describe(Dim dim) const {
    static constexpr const char* kNames[] = {
        "G", "M", "N",           "K",           "T",           "1 or G",      "F",     "A",
        "S", "J", "ceil(M/128)", "ceil(N/128)", "ceil(K/128)", "ceil(F/128)", "T/128", "T"};
    std::string text = kNames[static_cast<size_t>(dim)];
    int64_t size = (*this)[dim];
    return size == 0 ? text : text + "=" + std::to_string(size);
  }

 private:
  std::array<int64_t, kNumBoundDims> bound_{};
};

// Every shape, dtype, address and attribute of the call against its target. Throws CallError.
Sizes check(const Call& call);

[[noreturn]] void fail(const Target& target, const std::string& message);

}  // namespace jaxfp8
