"""What commands of stages share: from flags to processes, with what is looked up and counted before any is started."""
