/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * A device file that takes commands: write one line of words, read the answer, lines of key=value.
 *
 * A module defines "commands" and calls command_open(), command_write() and command_read() from its
 * file operations. What a step of the kernel's returned is part of the answer (errno=N); a write
 * fails only if the command itself makes no sense.
 */
#ifndef COMMAND_FILE_H
#define COMMAND_FILE_H

#include <linux/fs.h>
#include <linux/kernel.h>
#include <linux/mutex.h>
#include <linux/pci.h>
#include <linux/slab.h>
#include <linux/string.h>
#include <linux/uaccess.h>

#define COMMAND_BYTES	4096
#define COMMAND_WORDS	80
#define ANSWER_BYTES	8192

struct answer {
	size_t length;
	char text[ANSWER_BYTES];
};

typedef int (*command_fn)(void *context, struct answer *answer, int count, char **words);

struct command {
	const char *name;
	command_fn act;
};

static inline void __printf(2, 3) say(struct answer *answer, const char *format, ...)
{
	va_list arguments;

	va_start(arguments, format);
	answer->length += vscnprintf(answer->text + answer->length, ANSWER_BYTES - answer->length,
				     format, arguments);
	va_end(arguments);
}

/* What a step returned, 0 or a negative number, as the last word of a line. */
static inline void say_errno(struct answer *answer, long error)
{
	say(answer, "errno=%ld\n", -error);
}

/* The function called 0000:05:00.0, with a reference, or an ERR_PTR. */
static inline struct pci_dev *named_function(const char *name)
{
	unsigned int domain, bus, slot, number;
	struct pci_dev *pdev;
	char after;

	if (sscanf(name, "%x:%x:%x.%x%c", &domain, &bus, &slot, &number, &after) != 4)
		return ERR_PTR(-EINVAL);
	pdev = pci_get_domain_bus_and_slot(domain, bus, PCI_DEVFN(slot, number));
	return pdev ?: ERR_PTR(-ENODEV);
}

/* Run what the user wrote. A negative number if there is no such command or it makes no sense. */
static inline ssize_t run_command(const struct command *commands, size_t known, void *context,
				  struct answer *answer, const char __user *data, size_t size)
{
	char *words[COMMAND_WORDS], *text, *rest, *word;
	int count = 0, error = -EINVAL;
	size_t i;

	if (size > COMMAND_BYTES)
		return -E2BIG;
	rest = text = memdup_user_nul(data, size);
	if (IS_ERR(text))
		return PTR_ERR(text);
	while ((word = strsep(&rest, " \n"))) {
		if (!*word)
			continue;
		if (count == COMMAND_WORDS) {
			kfree(text);
			return -E2BIG;
		}
		words[count++] = word;
	}
	answer->length = 0;
	for (i = 0; count && i < known; i++) {
		if (!strcmp(words[0], commands[i].name)) {
			error = commands[i].act(context, answer, count - 1, words + 1);
			break;
		}
	}
	kfree(text);
	return error ?: size;
}

#endif
