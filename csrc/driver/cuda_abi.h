// The part of the CUDA driver's binary interface that the driver table uses (CUDA driver API
// reference; the values are fixed since CUDA 12.0). Declared here so that host code is the same,
// and compiles, with and without a CUDA toolkit; cuda_abi_check.cc compares it with cuda.h.
#pragma once
#include <cstddef>
#include <cstdint>

namespace jaxfp8::cuda {

// CUresult; those that an error message says more about
using Result = int;
constexpr Result kSuccess = 0, kOutOfMemory = 2, kNotInitialized = 3, kDeinitialized = 4,
                 kNoDevice = 100, kInvalidImage = 200, kNoBinaryForGpu = 209,
                 kEccUncorrectable = 214, kIllegalAddress = 700, kLaunchFailed = 719,
                 kSystemDriverMismatch = 803;

using Device = int;
using Context = struct ContextHandle*;
using Stream = struct StreamHandle*;
using Library = struct LibraryHandle*;
using Kernel = struct KernelHandle*;
using Function = struct FunctionHandle*;  // a Kernel may be passed for it

// CUdevice_attribute
constexpr int kMultiprocessorCount = 16;
constexpr int kComputeCapabilityMajor = 75;
constexpr int kComputeCapabilityMinor = 76;

// CUfunction_attribute
constexpr int kMaxDynamicSharedSizeBytes = 8;

// CUstreamCaptureMode
constexpr int kCaptureModeRelaxed = 2;

// CUtensorMapDataType
constexpr int kTensorMapUint8 = 0;
constexpr int kTensorMapFloat32 = 7;
constexpr int kTensorMapBfloat16 = 9;
// CUtensorMapInterleave, CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill
constexpr int kInterleaveNone = 0;
constexpr int kSwizzleNone = 0, kSwizzle32B = 1, kSwizzle64B = 2, kSwizzle128B = 3;
constexpr int kL2Promotion256B = 3;
constexpr int kOutOfBoundsZeros = 0;

// CUtensorMap
struct alignas(128) TensorMap {
  uint64_t opaque[16];
};

// CUlaunchAttribute; a union of 64 bytes, of which the cluster's dimensions are used.
constexpr int kLaunchClusterDimension = 4;
struct LaunchAttribute {
  int id;
  char pad[8 - sizeof(int)];
  union {
    char size[64];
    struct {
      unsigned x, y, z;
    } cluster;
  } value;
};

// CUlaunchConfig
struct LaunchConfig {
  unsigned grid_x, grid_y, grid_z;
  unsigned block_x, block_y, block_z;
  unsigned dynamic_smem;
  Stream stream;
  LaunchAttribute* attributes;
  unsigned num_attributes;
};

// clang-format off
// X(entry point, parameters). The names are those of the library's symbols.
#define JAXFP8_DRIVER_ENTRY_POINTS(X)                                                             \
  X(cuInit, (unsigned flags))                                                                     \
  X(cuDriverGetVersion, (int* version))                                                           \
  X(cuGetErrorName, (Result error, const char** name))                                            \
  X(cuGetErrorString, (Result error, const char** text))                                          \
  X(cuDeviceGetAttribute, (int* value, int attribute, Device device))                             \
  X(cuStreamGetCtx, (Stream stream, Context* context))                                            \
  X(cuCtxGetCurrent, (Context* context))                                                          \
  X(cuCtxPushCurrent_v2, (Context context))                                                       \
  X(cuCtxPopCurrent_v2, (Context* context))                                                       \
  X(cuCtxGetDevice, (Device* device))                                                             \
  X(cuCtxGetId, (Context context, uint64_t* number))                                              \
  X(cuMemcpyDtoDAsync_v2, (uint64_t target, uint64_t source, size_t bytes, Stream stream))        \
  X(cuThreadExchangeStreamCaptureMode, (int* mode))                                               \
  X(cuLibraryLoadData, (Library* library, const void* image, int* jit_options,                    \
                        void** jit_values, unsigned num_jit_options, int* library_options,        \
                        void** library_values, unsigned num_library_options))                     \
  X(cuLibraryGetKernel, (Kernel* kernel, Library library, const char* name))                      \
  X(cuKernelSetAttribute, (int attribute, int value, Kernel kernel, Device device))               \
  X(cuKernelGetFunction, (Function* function, Kernel kernel))                                     \
  X(cuTensorMapEncodeTiled, (TensorMap* map, int type, unsigned rank, void* base,                 \
                             const uint64_t* dims, const uint64_t* strides, const uint32_t* box,  \
                             const uint32_t* element_strides, int interleave, int swizzle,        \
                             int l2_promotion, int out_of_bounds))                                \
  X(cuLaunchKernelEx, (const LaunchConfig* config, Function function, void** args, void** extra))
// clang-format on

struct Table {
#define JAXFP8_FIELD(name, parameters) Result(*name) parameters = nullptr;
  JAXFP8_DRIVER_ENTRY_POINTS(JAXFP8_FIELD)
#undef JAXFP8_FIELD
};

}  // namespace jaxfp8::cuda
