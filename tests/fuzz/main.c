/* SPDX-License-Identifier: BSD-3-Clause
 *
 * Gives libFuzzer its entry points, or with RTAP_REPLAY runs inputs from the standard input, each
 * after its length in two bytes. Python is here only to load the modules under test, which are the
 * C files that Cython made of rtap's kernels, or Python code; tools/fuzz.py builds and runs all of it. RTAP_HARNESS
 * in the environment names the module with the harness.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

static int (*fuzz_one)(const uint8_t *data, size_t n);

/* For harnesses of Python code: counters of what was run, which libFuzzer looks at. */
__attribute__((section("__libfuzzer_extra_counters"))) unsigned char rtap_lines[4096];

int LLVMFuzzerInitialize(int *argc, char ***argv)
{
	const char *harness = getenv("RTAP_HARNESS");
	PyObject *module, *address;

	(void)argc;
	(void)argv;
	Py_InitializeEx(0);
	module = PyImport_ImportModule(harness ? harness : "offload_fuzz");
	address = module ? PyObject_CallMethod(module, "address", NULL) : NULL;
	if (address == NULL) {
		PyErr_Print();
		exit(1);
	}
	fuzz_one = (int (*)(const uint8_t *, size_t))PyLong_AsVoidPtr(address);
	/* Nothing needs the interpreter from here on. */
	PyEval_SaveThread();
	return 0;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n)
{
	return fuzz_one(data, n);
}

#ifdef RTAP_REPLAY
int main(int argc, char **argv)
{
	static uint8_t input[1 << 16];
	unsigned long count = 0;
	uint8_t length[2];
	size_t n;

	LLVMFuzzerInitialize(&argc, &argv);
	while (fread(length, 1, 2, stdin) == 2) {
		n = length[0] | (size_t)length[1] << 8;
		if (fread(input, 1, n, stdin) != n)
			return 1;
		LLVMFuzzerTestOneInput(input, n);
		count++;
	}
	printf("%lu inputs\n", count);
	return 0;
}
#endif
