defmodule Bombus.Tokenizer do
  @moduledoc """
  A tokenizer, made by `Bombus.load_tokenizer/2`.

    * `:vocab_size` - how many tokens it knows, special ones included
    * `:chat_template?` - whether it comes with a chat template; then a string given to a serving is
      a user's message, and without one a text to be completed
  """

  @type t :: %__MODULE__{vocab_size: pos_integer(), chat_template?: boolean(), ref: reference()}

  @derive {Inspect, except: [:ref]}
  @enforce_keys [:ref, :vocab_size, :chat_template?]
  defstruct @enforce_keys
end
