// SPDX-License-Identifier: GPL-2.0-only
/* The device file of a module that takes commands, and the module's beginning and end. */

#include <linux/fs.h>
#include <linux/list.h>
#include <linux/miscdevice.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/rcupdate.h>
#include <linux/slab.h>
#include <linux/string.h>
#include <linux/uaccess.h>

#include "command_file.h"
#include "engine.h"

#define COMMAND_BYTES	4096
#define BOUNCE_OFFSET	0x100000

/* An open file. */
struct session {
	struct list_head node;
	struct answer answer;
	u8 context[] __aligned(sizeof(u64));
};

DEFINE_MUTEX(control_lock);
static LIST_HEAD(sessions);

void for_each_context(void (*act)(void *context, void *data), void *data)
{
	struct session *session;

	lockdep_assert_held(&control_lock);
	list_for_each_entry(session, &sessions, node)
		act(session->context, data);
}

void say(struct answer *answer, const char *format, ...)
{
	va_list arguments;

	va_start(arguments, format);
	answer->length += vscnprintf(answer->text + answer->length, ANSWER_BYTES - answer->length,
				     format, arguments);
	va_end(arguments);
}

void say_errno(struct answer *answer, long error)
{
	say(answer, "errno=%ld\n", -error);
}

struct pci_dev *named_function(const char *name)
{
	unsigned int domain, bus, slot, number;
	struct pci_dev *pdev;
	char after;

	if (sscanf(name, "%x:%x:%x.%x%c", &domain, &bus, &slot, &number, &after) != 4)
		return ERR_PTR(-EINVAL);
	pdev = pci_get_domain_bus_and_slot(domain, bus, PCI_DEVFN(slot, number));
	return pdev ?: ERR_PTR(-ENODEV);
}

bool is_ours(struct pci_dev *pdev)
{
	return pdev->dev.driver == &command_file.driver->driver;
}

void *named_data(const char *name)
{
	struct pci_dev *pdev = named_function(name);
	void *data;

	if (IS_ERR(pdev))
		return ERR_CAST(pdev);
	data = is_ours(pdev) ? pci_get_drvdata(pdev) : NULL;
	pci_dev_put(pdev);
	return data ?: ERR_PTR(-EPERM);
}

static int control_open(struct inode *inode, struct file *file)
{
	struct session *session = kvzalloc(sizeof(*session) + command_file.context_bytes,
					   GFP_KERNEL);

	if (!session)
		return -ENOMEM;
	file->private_data = session;
	mutex_lock(&control_lock);
	if (command_file.open)
		command_file.open(session->context);
	list_add(&session->node, &sessions);
	mutex_unlock(&control_lock);
	return 0;
}

static int control_release(struct inode *inode, struct file *file)
{
	struct session *session = file->private_data;

	mutex_lock(&control_lock);
	if (command_file.release)
		command_file.release(session->context);
	list_del(&session->node);
	mutex_unlock(&control_lock);
	kvfree(session);
	return 0;
}

static ssize_t run_command(struct session *session, const char __user *data, size_t size)
{
	const struct command *command = command_file.commands;
	int count, error = -EINVAL;
	char *text, **words;

	if (size > COMMAND_BYTES)
		return -E2BIG;
	text = memdup_user_nul(data, size);
	if (IS_ERR(text))
		return PTR_ERR(text);
	words = argv_split(GFP_KERNEL, text, &count);
	kfree(text);
	if (!words)
		return -ENOMEM;
	while (count && command->name && strcmp(words[0], command->name))
		command++;
	session->answer.length = 0;
	if (count && command->name)
		error = command->act(session->context, &session->answer, count - 1, words + 1);
	argv_free(words);
	return error ?: size;
}

static void *bounce_of(struct session *session)
{
	return command_file.bounce ? command_file.bounce(session->context) : NULL;
}

static ssize_t control_write(struct file *file, const char __user *data, size_t size, loff_t *at)
{
	struct session *session = file->private_data;
	loff_t inside = *at - BOUNCE_OFFSET;
	ssize_t done = -ENOTCONN;
	void *bounce;

	mutex_lock(&control_lock);
	if (inside < 0) {
		done = run_command(session, data, size);
	} else {
		bounce = bounce_of(session);
		if (bounce)
			done = simple_write_to_buffer(bounce, BOUNCE_BYTES, &inside, data, size);
	}
	mutex_unlock(&control_lock);
	return done;
}

static ssize_t control_read(struct file *file, char __user *data, size_t size, loff_t *at)
{
	struct session *session = file->private_data;
	loff_t inside = *at - BOUNCE_OFFSET;
	ssize_t done = -ENOTCONN;
	void *bounce;

	mutex_lock(&control_lock);
	if (inside < 0) {
		done = simple_read_from_buffer(data, size, at, session->answer.text,
					       session->answer.length);
	} else {
		bounce = bounce_of(session);
		if (bounce)
			done = simple_read_from_buffer(data, size, &inside, bounce, BOUNCE_BYTES);
	}
	mutex_unlock(&control_lock);
	return done;
}

static const struct file_operations operations = {
	.owner = THIS_MODULE,
	.open = control_open,
	.release = control_release,
	.read = control_read,
	.write = control_write,
	.llseek = default_llseek,
};

static struct miscdevice device = {
	.minor = MISC_DYNAMIC_MINOR,
	.name = KBUILD_MODNAME,
	.fops = &operations,
	.mode = 0600,
};

static int __init control_init(void)
{
	int error = pci_register_driver(command_file.driver);

	if (error)
		return error;
	error = misc_register(&device);
	if (error)
		pci_unregister_driver(command_file.driver);
	return error;
}
module_init(control_init);

static void __exit control_exit(void)
{
	misc_deregister(&device);
	pci_unregister_driver(command_file.driver);
	/* Whoever looks into a fence of ours (plain_fence.h) that has signalled does so under RCU. */
	synchronize_rcu();
}
module_exit(control_exit);
