/* SPDX-License-Identifier: Apache-2.0 */
/* Enough of the CUDA driver to test driver.py without a GPU: device memory is the host's, and the
   one kernel, whatever its name, does what by_value of checks.cu does. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

static int allocations;
static int fail_launch;
static int shared_bytes;

int stub_allocations(void) { return allocations; }
int stub_shared_bytes(void) { return shared_bytes; }
void stub_fail_launch(int fail) { fail_launch = fail; }

int cuInit(unsigned flags) { return flags != 0; }
int cuDeviceGet(int* device, int number) {
  *device = 7;
  return number != 0;
}
int cuDevicePrimaryCtxRetain(void** context, int device) {
  *context = &allocations;
  return device != 7;
}
int cuDevicePrimaryCtxRelease_v2(int device) { return device != 7; }
int cuCtxSetCurrent(void* context) { return context != &allocations; }
int cuDeviceGetAttribute(int* value, int attribute, int device) {
  *value = attribute == 75 ? 9 : 0;
  return device != 7 || (attribute != 75 && attribute != 76);
}
int cuModuleLoadData(void** module, const void* image) {
  *module = &fail_launch;
  return memcmp(image, "\177ELF\0stub", 9) != 0;
}
int cuModuleUnload(void* module) { return module != &fail_launch; }
int cuModuleGetFunction(void** function, void* module, const char* name) {
  *function = &shared_bytes;
  return module != &fail_launch || strcmp(name, "by_value") != 0;
}
int cuFuncSetAttribute(void* function, int attribute, int value) {
  shared_bytes = value;
  return function != &shared_bytes || attribute != 8;
}
int cuMemAlloc_v2(uint64_t* pointer, size_t size) {
  ++allocations;
  *pointer = (uint64_t)(uintptr_t)malloc(size);
  return size == 0;
}
int cuMemFree_v2(uint64_t pointer) {
  --allocations;
  free((void*)(uintptr_t)pointer);
  return 0;
}
int cuMemcpyHtoD_v2(uint64_t to, const void* from, size_t size) {
  memcpy((void*)(uintptr_t)to, from, size);
  return 0;
}
int cuMemcpyDtoH_v2(void* to, uint64_t from, size_t size) {
  memcpy(to, (const void*)(uintptr_t)from, size);
  return 0;
}
int cuCtxSynchronize(void) { return 0; }
int cuGetErrorString(int error, const char** text) {
  *text = error == 700 ? "an illegal memory access was encountered" : "refused by the stub";
  return 0;
}

struct Arguments {
  const float* x;
  _Bool twice;
  float* out;
  int64_t sizes[2];
  float scale;
};

int cuLaunchKernel(void* function, unsigned grid_x, unsigned grid_y, unsigned grid_z,
                   unsigned block_x, unsigned block_y, unsigned block_z, unsigned smem,
                   void* stream, void** parameters, void** extra) {
  if (fail_launch) return 700;
  if (function != &shared_bytes || grid_x != 2 || grid_y != 3 || grid_z != 1) return 1;
  if (block_x != 64 || block_y != 1 || block_z != 1 || smem > 65536 || stream || extra) return 1;
  const struct Arguments* a = parameters[0];
  for (int64_t i = 0; i < a->sizes[1]; ++i) {
    a->out[i] = a->x[i + a->sizes[0]] * (a->twice ? 2.f : 1.f) * a->scale;
  }
  return 0;
}
