// SPDX-License-Identifier: GPL-2.0-only
/*
 * Lets QEMU's devices reach one another below a PCIe switch, as the switch of a real machine does.
 *
 * A switch whose ports do not redirect (PCI Express Base Specification 6.0, 6.12.3) sends a request
 * for an address below it straight there, past the IOMMU; Linux then gives a driver bus addresses
 * (drivers/pci/p2pdma.c). QEMU sends every request to the IOMMU. So, for each function that a
 * driver uses and each BAR of another function below a common bridge that does not redirect, this
 * module maps the BAR at its own bus address in the function's DMA domain. Nothing else can be
 * there: the kernel keeps the host bridge's windows out of what it hands out
 * (iova_reserve_pci_windows in drivers/iommu/dma-iommu.c).
 *
 * A window exists only while some function of its IOMMU group is bound to a driver that uses the
 * kernel's DMA API: so long the group's domain can be neither replaced nor given to a VFIO user.
 * Functions that VFIO owns are routed by their user (VFIO_IOMMU_MAP_DMA of the same windows); what
 * these are is shown as "outside".
 *
 * Windows belong to a group's domain: a function that shares a group with one that may pass gets
 * the windows too. Below redirecting ports every function has a group of its own.
 *
 * /proc/p2p_router shows all of it (lines of key=value words); writing "rescan" to it has
 * the ACS settings and BARs read again, which change without an event. Binding, unbinding, plugging
 * and unplugging are followed by themselves.
 */

#include <linux/device.h>
#include <linux/list.h>
#include <linux/module.h>
#include <linux/mutex.h>
#include <linux/notifier.h>
#include <linux/pci.h>
#include <linux/proc_fs.h>
#include <linux/seq_file.h>
#include <linux/slab.h>
#include <linux/string.h>
#include <linux/uaccess.h>
#include <linux/workqueue.h>

#include "router.h"

/* A plugged function is announced before it has its addresses. */
#define SETTLE_MS	100

static char *skip[8];
static int skipped;
module_param_array(skip, charp, &skipped, 0444);
MODULE_PARM_DESC(skip, "initiators that route by themselves, by vendor:device in hexadecimal");

/* Guards all that follows, and the windows; taken after device_lock and the PCI rescan lock. */
static DEFINE_MUTEX(lock);
static LIST_HEAD(initiators);
static bool stopping;

static bool routes_itself(struct pci_dev *pdev)
{
	char name[16];
	int i;

	snprintf(name, sizeof(name), "%04x:%04x", pdev->vendor, pdev->device);
	for (i = 0; i < skipped; i++)
		if (!strcasecmp(skip[i], name))
			return true;
	return false;
}

static bool uses_dma_api(struct pci_dev *pdev)
{
	return pdev->dev.driver && pdev->hdr_type == PCI_HEADER_TYPE_NORMAL &&
	       !to_pci_driver(pdev->dev.driver)->driver_managed_dma;
}

static void recompute(const struct pci_dev *leaving)
{
	struct list_head none = LIST_HEAD_INIT(none);

	lockdep_assert_held(&lock);
	windows_update(stopping ? &none : &initiators, leaving);
}

static void add_initiator(struct pci_dev *pdev)
{
	struct initiator *initiator;

	lockdep_assert_held(&lock);
	if (!uses_dma_api(pdev) || routes_itself(pdev))
		return;
	list_for_each_entry(initiator, &initiators, list)
		if (initiator->pdev == pdev)
			return;
	initiator = kzalloc(sizeof(*initiator), GFP_KERNEL);
	if (!initiator)
		return;
	initiator->pdev = pci_dev_get(pdev);
	list_add_tail(&initiator->list, &initiators);
}

static void remove_initiator(const struct pci_dev *pdev)
{
	struct initiator *initiator, *more;

	lockdep_assert_held(&lock);
	list_for_each_entry_safe(initiator, more, &initiators, list)
		if (!pdev || initiator->pdev == pdev) {
			list_del(&initiator->list);
			pci_dev_put(initiator->pdev);
			kfree(initiator);
		}
}

static void rescan(struct work_struct *work)
{
	/* Whoever plugs or unplugs holds this until all addresses are assigned. */
	pci_lock_rescan_remove();
	mutex_lock(&lock);
	recompute(NULL);
	mutex_unlock(&lock);
	pci_unlock_rescan_remove();
}

static DECLARE_DELAYED_WORK(settle, rescan);

static int on_event(struct notifier_block *block, unsigned long event, void *data)
{
	struct pci_dev *pdev = to_pci_dev((struct device *)data);

	mutex_lock(&lock);
	switch (event) {
	case BUS_NOTIFY_BOUND_DRIVER:
		add_initiator(pdev);
		recompute(NULL);
		break;
	case BUS_NOTIFY_UNBIND_DRIVER:	/* the domain is still the driver's */
		remove_initiator(pdev);
		recompute(NULL);
		break;
	case BUS_NOTIFY_DEL_DEVICE:
		remove_initiator(pdev);
		recompute(pdev);
		break;
	case BUS_NOTIFY_ADD_DEVICE:
		schedule_delayed_work(&settle, msecs_to_jiffies(SETTLE_MS));
		break;
	}
	mutex_unlock(&lock);
	return NOTIFY_DONE;
}

static struct notifier_block notifier = { .notifier_call = on_event };

/* What a function may reach that its driver maps for itself (VFIO), for its user to install. */
static void show_outside(struct seq_file *file, struct pci_dev *initiator)
{
	struct pci_dev *peer = NULL;
	int bar;

	for_each_pci_dev(peer) {
		if (peer == initiator || peer->hdr_type != PCI_HEADER_TYPE_NORMAL ||
		    !routed(initiator, peer))
			continue;
		for (bar = 0; bar < PCI_STD_NUM_BARS; bar++)
			if (is_reachable(peer, bar))
				seq_printf(file,
					   "outside initiator=%s peer=%s bar=%d start=0x%llx size=0x%llx\n",
					   pci_name(initiator), pci_name(peer), bar,
					   (unsigned long long)pci_bus_address(peer, bar),
					   (unsigned long long)pci_resource_len(peer, bar));
	}
}

static int show(struct seq_file *file, void *unused)
{
	struct initiator *initiator;
	struct pci_dev *pdev = NULL;

	mutex_lock(&lock);
	list_for_each_entry(initiator, &initiators, list)
		seq_printf(file, "initiator %s translated=%d\n", pci_name(initiator->pdev),
			   !!translating_domain(initiator->pdev));
	windows_show(file);
	mutex_unlock(&lock);
	for_each_pci_dev(pdev) {
		device_lock(&pdev->dev);	/* comes before the mutex */
		if (pdev->dev.driver && pdev->hdr_type == PCI_HEADER_TYPE_NORMAL &&
		    to_pci_driver(pdev->dev.driver)->driver_managed_dma && !routes_itself(pdev))
			show_outside(file, pdev);
		device_unlock(&pdev->dev);
	}
	return 0;
}

static int router_open(struct inode *inode, struct file *file)
{
	return single_open(file, show, NULL);
}

static ssize_t router_write(struct file *file, const char __user *data, size_t size, loff_t *ppos)
{
	char text[16];

	if (!size || size >= sizeof(text))
		return -EINVAL;
	if (copy_from_user(text, data, size))
		return -EFAULT;
	text[size] = '\0';
	if (strcmp(strim(text), "rescan"))
		return -EINVAL;
	rescan(NULL);
	return size;
}

static const struct proc_ops operations = {
	.proc_open = router_open,
	.proc_read = seq_read,
	.proc_write = router_write,
	.proc_lseek = seq_lseek,
	.proc_release = single_release,
};

static int __init router_init(void)
{
	struct pci_dev *pdev = NULL;
	int error;

	if (!proc_create(KBUILD_MODNAME, 0600, NULL, &operations))
		return -ENOMEM;
	error = bus_register_notifier(&pci_bus_type, &notifier);
	if (error) {
		remove_proc_entry(KBUILD_MODNAME, NULL);
		return error;
	}
	for_each_pci_dev(pdev) {
		device_lock(&pdev->dev);	/* no driver comes or goes meanwhile */
		mutex_lock(&lock);
		add_initiator(pdev);
		mutex_unlock(&lock);
		device_unlock(&pdev->dev);
	}
	rescan(NULL);
	return 0;
}
module_init(router_init);

static void __exit router_exit(void)
{
	remove_proc_entry(KBUILD_MODNAME, NULL);
	/* While events still come, so that no window outlives the binding that it rests on. */
	mutex_lock(&lock);
	stopping = true;
	recompute(NULL);
	mutex_unlock(&lock);
	bus_unregister_notifier(&pci_bus_type, &notifier);
	cancel_delayed_work_sync(&settle);
	mutex_lock(&lock);
	remove_initiator(NULL);
	mutex_unlock(&lock);
	windows_free();
}
module_exit(router_exit);

MODULE_DESCRIPTION("Routes peer-to-peer requests below PCIe switches as the switches would");
MODULE_LICENSE("GPL");
