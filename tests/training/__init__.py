"""Router training, without Ray and on it."""
