/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * What the modules that take commands have in common: a PCI driver that gets its functions through
 * driver_override, and /dev/MODULE. Write one line of words, read the answer, lines of key=value.
 *
 * A module defines "command_file", names command_file.o in its Kbuild, and has no init and exit of
 * its own. What a step of the kernel's returned is part of the answer (errno=N); a write fails only
 * if the command itself makes no sense.
 */
#ifndef COMMAND_FILE_H
#define COMMAND_FILE_H

#include <linux/mutex.h>
#include <linux/pci.h>
#include <linux/types.h>

#define ANSWER_BYTES	8192

struct answer {
	size_t length;
	char text[ANSWER_BYTES];
};

/* "words" are the "count" that follow the command's name. */
struct command {
	const char *name;
	int (*act)(void *context, struct answer *answer, int count, char **words);
};

/*
 * @commands	up to one without a name
 * @context_bytes	what an open file keeps between its commands; zeroed at first
 * @open, @release	make and undo such a context; NULL: there is nothing to do
 * @bounce	BOUNCE_BYTES of memory to be read and written at offset 0x100000 of the file; it, or
 *		what it returns, is NULL where there is none
 *
 * All of them are called with the lock held.
 */
struct command_file {
	const struct command *commands;
	struct pci_driver *driver;
	size_t context_bytes;
	void (*open)(void *context);
	void (*release)(void *context);
	void *(*bounce)(void *context);
};

extern const struct command_file command_file;

/*
 * One command at a time, of whomever; taken before every other lock of a module's, and by a driver
 * that lets a function go which commands use. No worker of a module's takes it.
 */
extern struct mutex control_lock;

/* The lock is held. */
void for_each_context(void (*act)(void *context, void *data), void *data);

void __printf(2, 3) say(struct answer *answer, const char *format, ...);
/* What a step returned, 0 or a negative number, as the last word of a line. */
void say_errno(struct answer *answer, long error);

/* The function called 0000:05:00.0, with a reference, or an ERR_PTR. */
struct pci_dev *named_function(const char *name);
/* Bound to the module's driver: for as long as the caller holds the device's lock. */
bool is_ours(struct pci_dev *pdev);
/* What the driver keeps of a function, if it takes the lock before it lets go; or an ERR_PTR. */
void *named_data(const char *name);

#endif
