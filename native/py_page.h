/* The Page type of the module: a metric page over a Python buffer. */
#ifndef ASC_PY_PAGE_H
#define ASC_PY_PAGE_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "page.h"

/* Add Page to the module. 0, or -1 with an exception set. */
int asc_add_page_types(PyObject *module);

/* The page of a Page object, valid while the object lives; NULL with TypeError for any other object. A page over a
 * read-only buffer is refused with ValueError: its holder would write to it. */
asc_page *asc_page_of(PyObject *object);

#endif
