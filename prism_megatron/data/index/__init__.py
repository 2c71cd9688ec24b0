"""Where the records of sets lie and how long they are; which of them a run may draw."""
