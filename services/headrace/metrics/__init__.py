"""All metrics: what there is (`catalogue`), how it is recorded (`instruments`), and its words (`words`)."""
