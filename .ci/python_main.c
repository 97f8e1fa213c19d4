/* To be preloaded into a program that has CPython in it: it becomes the python command. What that
   command does of its own is not in the program: to run what the command line names. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>

/* Headers may not be there for this version. */
void *PyInitConfig_Create(void);
int PyInitConfig_SetInt(void *, const char *, int64_t);
int PyInitConfig_SetStrList(void *, const char *, size_t, char *const *);
int PyInitConfig_GetExitCode(void *, int *);
int PyInitConfig_GetError(void *, const char **);
int Py_InitializeFromInitConfig(void *);
void *_Py_GetConfigsAsDict(void);
int PySys_SetObject(const char *, void *);
int PyRun_SimpleString(const char *);
int Py_FinalizeEx(void);

static const char run[] =
    "import sys\n"
    "def run(command, module, file):\n"
    "    import os, runpy\n"
    "    if command is not None:\n"
    "        sys.path.insert(0, '')\n"
    "        exec(compile(command, '<string>', 'exec'), globals())\n"
    "    elif module is not None:\n"
    "        sys.path.insert(0, os.getcwd())\n"
    "        runpy._run_module_as_main(module)\n"
    "    else:\n"
    "        sys.path.insert(0, os.path.dirname(os.path.realpath(file)))\n"
    "        runpy.run_path(file, run_name='__main__')\n"
    "run(*map(sys._config['config'].get, ('run_command', 'run_module', 'run_filename')))\n";

static int python(int argc, char **argv) {
    static const char *as_python_has_it[] = {
        "parse_argv", "use_environment", "configure_locale", "configure_c_stdio",
        "install_signal_handlers", "user_site_directory"};
    void *config = PyInitConfig_Create();
    const char *message;
    int status;
    PyInitConfig_SetInt(config, "isolated", 0);
    PyInitConfig_SetInt(config, "safe_path", 0);
    for (int i = 0; i < 6; i++) PyInitConfig_SetInt(config, as_python_has_it[i], 1);
    PyInitConfig_SetStrList(config, "argv", argc, argv);
    if (Py_InitializeFromInitConfig(config)) {
        if (PyInitConfig_GetExitCode(config, &status)) return status;
        PyInitConfig_GetError(config, &message);
        fprintf(stderr, "%s\n", message);
        return 1;
    }
    PySys_SetObject("_config", _Py_GetConfigsAsDict());
    status = PyRun_SimpleString(run) ? 1 : 0;
    return Py_FinalizeEx() ? 120 : status;
}

int __libc_start_main(void *own_main, int argc, char **argv, void *init, void *fini, void *ld, void *end) {
    int (*start)(void *, int, char **, void *, void *, void *, void *) = dlsym(RTLD_NEXT, __func__);
    return start(python, argc, argv, init, fini, ld, end);
}
