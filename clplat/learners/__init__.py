"""What learns: the LightningModule in `learner`, networks in `nets`, one recurrence a file in `mixers`."""
