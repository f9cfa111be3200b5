// SPDX-License-Identifier: GPL-2.0-only
/*
 * Device-private memory on a GPU's BAR, and devices that mirror a process's memory (HMM).
 *
 * Interface: open /dev/hmm_peer, write one command, read its answer; each open file mirrors one
 * range of its process's memory. At offset 0x100000 of the file are the 4 KiB of memory that the
 * device copies from and to.
 *
 *   take FUNCTION ADDRESS PAGES	migrate pages of the calling process into FUNCTION's memory
 *   owner FUNCTION			how many of its pages are used, and were taken back
 *   mirror FUNCTION ADDRESS PAGES [group=FUNCTION] [WORD...]	a device looks at them
 *   state				what it has now
 *   dma to|from PAGE SIZE [stale]	it copies into a page, or out of it
 *
 * "group" names the memory whose private pages the device takes for its own. Words: peer2peer (asks
 * other owners for peer-to-peer pages), and wrong ones: no-check, fake (peer.h). Functions are
 * driven by this module through driver_override: a memory (BAR 2) or an engine.
 */

#include <linux/miscdevice.h>
#include <linux/module.h>

#include "peer.h"

#define NAME		"hmm_peer"
#define BOUNCE_OFFSET	0x100000

DEFINE_MUTEX(control_lock);
LIST_HEAD(owners);
static LIST_HEAD(mirrors);
static struct pci_driver driver;

/* What a function of ours is: exactly one is set. */
struct peer {
	struct owner *owner;
	struct engine *engine;
};

/* While the control lock is held the driver does not let the function go. */
static struct peer *peer_by_name(const char *name)
{
	struct pci_dev *pdev = named_function(name);
	struct peer *peer = ERR_PTR(-EPERM);

	if (IS_ERR(pdev))
		return ERR_CAST(pdev);
	if (pdev->dev.driver == &driver.driver && pci_get_drvdata(pdev))
		peer = pci_get_drvdata(pdev);
	pci_dev_put(pdev);
	return peer;
}

static struct owner *owner_by_name(const char *name)
{
	struct peer *peer = peer_by_name(name);

	if (IS_ERR(peer))
		return ERR_CAST(peer);
	return peer->owner ?: ERR_PTR(-EINVAL);
}

static int parse_range(char **words, unsigned long *start, unsigned long *pages)
{
	if (kstrtoul(words[0], 0, start) || kstrtoul(words[1], 0, pages) || !*pages ||
	    *pages > MIRROR_PAGES || !PAGE_ALIGNED(*start))
		return -EINVAL;
	return 0;
}

static int do_take(void *context, struct answer *answer, int count, char **words)
{
	unsigned long start, pages;
	struct owner *owner;
	int error;

	if (count != 3 || parse_range(words + 1, &start, &pages))
		return -EINVAL;
	owner = owner_by_name(words[0]);
	if (IS_ERR(owner))
		return PTR_ERR(owner);
	error = owner_take(owner, answer, start, pages);
	if (error)
		say_errno(answer, error);
	return 0;
}

static int do_owner(void *context, struct answer *answer, int count, char **words)
{
	struct owner *owner;

	if (count != 1)
		return -EINVAL;
	owner = owner_by_name(words[0]);
	if (IS_ERR(owner))
		return PTR_ERR(owner);
	say(answer, "used=%u to_ram=%d\n", owner_in_use(owner), atomic_read(&owner->to_ram));
	return 0;
}

static int parse_manners(struct manners *manners, int count, char **words)
{
	int i;

	*manners = (struct manners){};
	for (i = 0; i < count; i++) {
		if (!strcmp(words[i], "peer2peer")) {
			manners->peer2peer = true;
		} else if (!strcmp(words[i], "no-check")) {
			manners->peer2peer = manners->no_check = true;
		} else if (!strcmp(words[i], "fake")) {
			manners->peer2peer = manners->fake = true;
		} else if (!strncmp(words[i], "group=", 6)) {
			manners->group = owner_by_name(words[i] + 6);
			if (IS_ERR(manners->group))
				return PTR_ERR(manners->group);
		} else {
			return -EINVAL;
		}
	}
	return 0;
}

static int do_mirror(void *context, struct answer *answer, int count, char **words)
{
	struct mirror *mirror = context;
	unsigned long start, pages;
	struct manners manners;
	struct peer *peer;
	int error;

	if (count < 3 || parse_range(words + 1, &start, &pages))
		return -EINVAL;
	error = parse_manners(&manners, count - 3, words + 3);
	if (error)
		return error;
	peer = peer_by_name(words[0]);
	if (IS_ERR(peer))
		return PTR_ERR(peer);
	if (!peer->engine)
		return -EINVAL;
	error = mirror_make(mirror, peer->engine, &manners, start, pages);
	if (error)
		say_errno(answer, error);
	else
		mirror_say(mirror, answer);
	return 0;
}

static int do_state(void *context, struct answer *answer, int count, char **words)
{
	mirror_say(context, answer);
	return 0;
}

static int do_dma(void *context, struct answer *answer, int count, char **words)
{
	bool to_memory, stale = count == 4 && !strcmp(words[3], "stale");
	unsigned long page;
	unsigned int size;

	if ((count != 3 && !stale) || kstrtoul(words[1], 0, &page) ||
	    kstrtouint(words[2], 0, &size))
		return -EINVAL;
	to_memory = !strcmp(words[0], "to");
	if (!to_memory && strcmp(words[0], "from"))
		return -EINVAL;
	say_errno(answer, mirror_dma(context, to_memory, page, size, stale));
	return 0;
}

static const struct command commands[] = {
	{ "take", do_take },
	{ "owner", do_owner },
	{ "mirror", do_mirror },
	{ "state", do_state },
	{ "dma", do_dma },
};

static int control_open(struct inode *inode, struct file *file)
{
	struct mirror *mirror = kvzalloc(sizeof(*mirror), GFP_KERNEL);

	if (!mirror)
		return -ENOMEM;
	mutex_init(&mirror->lock);
	file->private_data = mirror;
	mutex_lock(&control_lock);
	list_add(&mirror->node, &mirrors);
	mutex_unlock(&control_lock);
	return 0;
}

static int control_release(struct inode *inode, struct file *file)
{
	struct mirror *mirror = file->private_data;

	mutex_lock(&control_lock);
	mirror_end(mirror);
	list_del(&mirror->node);
	mutex_unlock(&control_lock);
	kvfree(mirror);
	return 0;
}

static ssize_t control_write(struct file *file, const char __user *data, size_t size, loff_t *at)
{
	struct mirror *mirror = file->private_data;
	ssize_t done = -ENOTCONN;

	mutex_lock(&control_lock);
	if (*at < BOUNCE_OFFSET) {
		done = run_command(commands, ARRAY_SIZE(commands), mirror, &mirror->answer, data,
				   size);
	} else if (mirror->active) {
		loff_t inside = *at - BOUNCE_OFFSET;

		done = simple_write_to_buffer(mirror->engine->bounce, BOUNCE_BYTES, &inside, data,
					      size);
	}
	mutex_unlock(&control_lock);
	return done;
}

static ssize_t control_read(struct file *file, char __user *data, size_t size, loff_t *at)
{
	struct mirror *mirror = file->private_data;
	ssize_t done = -ENOTCONN;

	mutex_lock(&control_lock);
	if (*at < BOUNCE_OFFSET) {
		done = simple_read_from_buffer(data, size, at, mirror->answer.text,
					       mirror->answer.length);
	} else if (mirror->active) {
		loff_t inside = *at - BOUNCE_OFFSET;

		done = simple_read_from_buffer(data, size, &inside, mirror->engine->bounce,
					       BOUNCE_BYTES);
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
	.name = NAME,
	.fops = &operations,
	.mode = 0600,
};

static int driver_probe(struct pci_dev *pdev, const struct pci_device_id *id)
{
	struct peer *peer = devm_kzalloc(&pdev->dev, sizeof(*peer), GFP_KERNEL);
	struct engine *engine = devm_kzalloc(&pdev->dev, sizeof(*engine), GFP_KERNEL);
	struct owner *owner;
	int error;

	if (!peer || !engine)
		return -ENOMEM;
	error = engine_open(engine, pdev);
	if (!error) {
		peer->engine = engine;
	} else if (error == -ENODEV) {
		owner = owner_open(pdev);
		if (IS_ERR(owner))
			return PTR_ERR(owner);
		peer->owner = owner;
		mutex_lock(&control_lock);
		list_add(&owner->node, &owners);
		mutex_unlock(&control_lock);
	} else {
		return error;
	}
	pci_set_drvdata(pdev, peer);
	return 0;
}

static void driver_remove(struct pci_dev *pdev)
{
	struct peer *peer = pci_get_drvdata(pdev);
	struct mirror *mirror;

	mutex_lock(&control_lock);
	list_for_each_entry(mirror, &mirrors, node) {
		void *group = mirror->manners.group;

		if (mirror->engine == peer->engine || (group && group == peer->owner))
			mirror_end(mirror);
	}
	if (peer->owner)
		list_del(&peer->owner->node);
	pci_set_drvdata(pdev, NULL);
	mutex_unlock(&control_lock);
	/* Page faults go on taking pages back while the rest is evicted. */
	if (peer->owner)
		owner_close(peer->owner);
	else
		engine_close(peer->engine);
}

static struct pci_driver driver = {
	.name = NAME,
	.probe = driver_probe,
	.remove = driver_remove,
};

static int __init peer_init(void)
{
	int error = pci_register_driver(&driver);

	if (error)
		return error;
	error = misc_register(&device);
	if (error)
		pci_unregister_driver(&driver);
	return error;
}
module_init(peer_init);

static void __exit peer_exit(void)
{
	misc_deregister(&device);
	pci_unregister_driver(&driver);
}
module_exit(peer_exit);

MODULE_DESCRIPTION("Device-private memory on a BAR, and devices that mirror a process's memory");
MODULE_LICENSE("GPL");
