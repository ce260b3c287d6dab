// Says which sources the library was built from, so that one that is older than the Python files is not called.
#include "simd.h"

BICOT_EXPORT const char* bicot_sources() { return BICOT_SOURCES; }
