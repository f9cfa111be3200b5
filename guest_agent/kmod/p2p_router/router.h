/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef ROUTER_H
#define ROUTER_H

#include <linux/iommu.h>
#include <linux/list.h>
#include <linux/pci.h>
#include <linux/seq_file.h>

/* A function that a driver uses through the DMA API. */
struct initiator {
	struct list_head list;
	struct pci_dev *pdev;
};

/* A request of the one for the other does not get as far as the root complex. */
bool routed(struct pci_dev *initiator, struct pci_dev *peer);
bool is_reachable(struct pci_dev *peer, int bar);

/* The function's domain if the kernel's DMA API translates for it, or NULL. */
struct iommu_domain *translating_domain(struct pci_dev *pdev);
/* Make the windows what these initiators ask for now. LEAVING is a function that is about to go. */
void windows_update(struct list_head *initiators, const struct pci_dev *leaving);
void windows_show(struct seq_file *file);
/* What is left after an update without initiators. */
void windows_free(void);

#endif
